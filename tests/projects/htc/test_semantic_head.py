import pytest
import torch
from torch.nn import functional as F

from d2ext.projects.htc import FusedSemanticHead

from tests.projects.htc.helpers import pyramid

LEVELS = ("p2", "p3", "p4", "p5", "p6")


def head(**kwargs):
    torch.manual_seed(0)
    kwargs = {"in_channels": 8, "conv_dim": 6, "num_conv": 2, "num_classes": 7, **kwargs}
    result = FusedSemanticHead(**kwargs)
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return result


def bilinear_align_corners(x, size):
    """Corner pixels stay at the corners; two matrix products instead of an interpolation call."""

    def matrix(n_out, n_in):
        m = torch.zeros(n_out, n_in)
        for i in range(n_out):
            position = i * (n_in - 1) / (n_out - 1)
            low = min(int(position), n_in - 2)
            m[i, low], m[i, low + 1] = 1 - (position - low), position - low
        return m

    rows, columns = matrix(size[0], x.shape[2]), matrix(size[1], x.shape[3])
    return torch.einsum("ih,nchw,jw->ncij", rows, x, columns)


def test_features_follow_the_paper():
    layer = head()
    features = pyramid(size=(128, 192))
    p = dict(layer.named_parameters())
    total = 0
    for n, name in enumerate(LEVELS):
        x = features[name]
        if name != "p3":
            x = bilinear_align_corners(x, (16, 24))
        total = total + F.relu(
            F.conv2d(x, p[f"lateral_convs.{n}.weight"], p[f"lateral_convs.{n}.bias"])
        )
    for n in range(2):
        weight, bias = p[f"convs.{n}.weight"], p[f"convs.{n}.bias"]
        total = F.relu(F.conv2d(total, weight, bias, padding=1))
    embedding = F.relu(F.conv2d(total, p["conv_embedding.weight"], p["conv_embedding.bias"]))
    logits = F.conv2d(total, p["conv_logits.weight"], p["conv_logits.bias"])

    shared, ours = layer(features)
    assert torch.allclose(ours, embedding, atol=1e-4)
    assert torch.allclose(layer.logits(shared), logits, atol=1e-4)
    assert ours.shape == (2, 8, 16, 24) and logits.shape == (2, 7, 16, 24)
    assert (logits < 0).any()  # no activation


def loss_by_hand(layer, shared, labels, all_pixels):
    logits = layer.logits(shared).log_softmax(dim=1)
    total, count = 0, 0
    for n in range(labels.shape[0]):
        for i in range(shared.shape[2]):
            for j in range(shared.shape[3]):
                label = labels[n, 8 * i, 8 * j]
                if label != 255:
                    total = total - logits[n, label, i, j]
                count += int(all_pixels or label != 255)
    return (0.2 * total / count).item()


@pytest.mark.parametrize("all_pixels", [False, True])
def test_loss_averages_over_the_chosen_pixels(all_pixels):
    layer = head(mean_over_all_pixels=all_pixels)
    shared = torch.randn(2, 6, 4, 6)
    labels = torch.randint(7, (2, 32, 48))
    labels[:, :, 20:] = 255
    loss = layer.losses(shared, labels)
    assert list(loss) == ["loss_semantic_seg"]
    expected = loss_by_hand(layer, shared, labels, all_pixels)
    assert loss["loss_semantic_seg"].item() == pytest.approx(expected, rel=1e-5)


def test_label_reduction_is_nearest_neighbour_resizing():
    labels = torch.randint(7, (1, 64, 96))
    resized = F.interpolate(labels[:, None].float(), scale_factor=1 / 8, mode="nearest")[:, 0]
    assert torch.equal(labels[:, ::8, ::8], resized.long())


def test_all_pixels_ignored_gives_a_connected_zero():
    layer = head()
    shared = torch.randn(1, 6, 2, 2, requires_grad=True)
    loss = layer.losses(shared, torch.full((1, 16, 16), 255))["loss_semantic_seg"]
    loss.backward()
    assert loss.item() == 0
    assert shared.grad.abs().sum() == 0 and layer.conv_logits.weight.grad.abs().sum() == 0


def test_labels_without_channel_are_reported():
    with pytest.raises(ValueError, match="label 7, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 7"):
        head().losses(torch.randn(1, 6, 2, 2), torch.full((1, 16, 16), 7))


def test_reference_level_has_to_be_among_the_inputs():
    with pytest.raises(ValueError, match="reference_feature 'p1'"):
        head(reference_feature="p1")
