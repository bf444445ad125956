"""Batches in parts: one step of all parts is the step of the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from d2ext.config import load_projects
from d2ext.engine import build_experiment, train
from d2ext.engine.trainer import CheckedTrainer
from d2ext.errors import UserError
from d2ext.modeling.parts import BatchInParts, note_count, padded_size

from detectron2.utils.events import EventStorage

from tests.engine.helpers import ROOT
from tests.engine.test_resume import PowerFailure, failing_after, same_tensors, weights_of

KEYS = {"yaml": "SOLVER.ACCUMULATION_STEPS=2", "py": "train.accumulation_steps=2"}


class Line(torch.nn.Module):
    """A mean of squares, and a mean over those numbers that are above 0, of the whole batch."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)

    def forward(self, batch):
        out = self.line(torch.stack([x["numbers"] for x in batch]))[:, 0]
        chosen = torch.tensor([float(x["numbers"][0] > 0) for x in batch])
        from d2ext.modeling.regions.losses import divide_by_count

        total = (chosen * out.square()).sum()
        return {"loss_a": (out - 1).square().mean(), "loss_b": divide_by_count(total, chosen.sum())}


def batches(count, size=8):
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(count, size, 3, generator=generator)
    return [
        [{"numbers": x, "image_id": n, "file_name": f"{n}.jpg"} for n, x in enumerate(batch)]
        for batch in numbers
    ]


def trained(tmp_path, parts, data, model=None, **options):
    torch.manual_seed(0)
    model = model or Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = CheckedTrainer(
        model, data, optimizer, output_dir=str(tmp_path), parts=parts, **options
    )
    with EventStorage():
        for trainer.iter in range(len(data)):
            trainer.run_step()
    return trainer


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_give_the_weights_of_the_whole_batch(tmp_path, parts):
    whole = trained(tmp_path, 1, batches(5)).model.state_dict()
    found = trained(tmp_path, parts, batches(5)).model.state_dict()
    for key in whole:
        torch.testing.assert_close(found[key], whole[key], rtol=0, atol=1e-6)


def test_a_batch_that_has_no_equal_parts_is_refused(tmp_path, short_run):
    with pytest.raises(UserError, match="a batch of 8 images cannot be cut into 3 equal parts"):
        trained(tmp_path, 3, batches(1))
    for kind, name in (("yaml", "SOLVER.ACCUMULATION_STEPS"), ("py", "train.accumulation_steps")):
        run = short_run("mask_rcnn", kind, "run", f"{name}=3")
        with pytest.raises(UserError, match="is 3, but a batch of 2 images .* multiple of 3"):
            train(run)


def test_a_nan_in_one_part_leaves_out_the_whole_step(tmp_path):
    data = batches(3)
    data[1][5]["numbers"] = torch.full((3,), float("nan"))
    spoiled = trained(tmp_path, 4, data, skip=True)
    without = trained(tmp_path, 4, [data[0], data[2]])
    assert same_tensors(spoiled.model.state_dict(), without.model.state_dict())
    assert spoiled.state_dict()["skipped_iterations"] == 1
    with pytest.raises(UserError, match=r"iteration 1: loss_a nan.*5 \(5.jpg\)"):
        trained(tmp_path, 4, data)


class Normed(Line):
    """With batch norm and numbers by chance, whose measuring must leave no trace."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.forwards = 0

    def forward(self, batch):
        self.forwards += 1
        seen = self.norm(torch.stack([x["numbers"] for x in batch]))
        noise = torch.rand(len(batch))
        batch = [{**x, "numbers": y + r} for x, y, r in zip(batch, seen, noise)]
        return super().forward(batch)


def test_measuring_counts_leaves_statistics_and_random_numbers_alone(tmp_path):
    after = trained(tmp_path, 2, batches(1), Normed())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Normed()
    torch.manual_seed(0)
    for part in (batches(1)[0][:4], batches(1)[0][4:]):
        model(part)
    assert torch.equal(torch.get_rng_state(), state)
    assert after.model.forwards == 4
    assert same_tensors(after.model.norm.state_dict() | {}, {
        **after.model.norm.state_dict(),
        "running_mean": model.norm.running_mean,
        "running_var": model.norm.running_var,
        "num_batches_tracked": torch.tensor(2),
    })  # fmt: skip


def test_losses_without_counts_are_not_measured_again(tmp_path):
    class Plain(Line):
        """Its loss is a mean over a part."""

        forwards = 0

        def forward(self, batch):
            self.forwards += 1
            out = self.line(torch.stack([x["numbers"] for x in batch]))
            return {"loss": out.square().mean()}

    assert trained(tmp_path, 4, batches(3), Plain()).model.forwards == 4 + 3 * 4


def test_parts_share_counts_and_the_padded_size():
    images = [torch.zeros(3, h, w) for h, w in ((10, 40), (33, 20), (5, 5), (6, 6))]
    whole = BatchInParts([{"image": x} for x in images], 2)
    assert padded_size(10, 40, 32) == (10, 40)  # of a batch in one piece
    for count in (3.0, 0.0):
        with whole.measuring():
            assert padded_size(6, 6, 32) == (64, 64) and padded_size(6, 6, 0) == (33, 40)
            note_count(torch.tensor(count))
    for own in (3.0, 0.0):
        with whole.computing():
            assert note_count(torch.tensor(own)) == 1.5


NETWORKS = {
    "htc": ("projects/HTC/configs/htc_tiny.yaml", ["MODEL.RESNETS.NORM=GN"]),
    "cascade": ("configs/cascade_mask_rcnn_tiny.yaml", ["MODEL.RESNETS.NORM=GN"]),
    "mask_rcnn": ("configs/mask_rcnn_tiny.yaml", ["MODEL.RESNETS.NORM=GN"]),
    "fcis": ("projects/FCIS/configs/fcis_tiny.yaml", []),
    "mnc": ("projects/MNC/configs/mnc_tiny.yaml", []),
}
# detectron2's own losses divide by counts of a part, and its samples are drawn from one generator:
# with all candidates sampled, parts that have the same image are equal.
ALL = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE=100000", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=100000"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_the_step_of_the_whole_batch(shapes_few, tmp_path, name):
    load_projects()
    config, options = NETWORKS[name]
    equal = name in ("mask_rcnn", "cascade")
    common = ["MODEL.DEVICE=cpu", "SOLVER.IMS_PER_BATCH=4", f"DATASETS.TRAIN={shapes_few}"]
    common += ["DATASETS.TEST=()", "MODEL.WEIGHTS=''", *options, *(ALL if equal else [])]
    experiment = build_experiment(str(ROOT / config), common)
    batch = next(iter(experiment.build_train_loader()))
    batch = batch[:1] * 4 if equal else batch
    torch.manual_seed(0)
    start = experiment.build_model().state_dict()
    steps = []
    for parts in (1, 2):
        model = experiment.build_model()
        model.load_state_dict(start)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        trainer = CheckedTrainer(model, [batch], optimizer, output_dir=str(tmp_path), parts=parts)
        with EventStorage():
            trainer.iter = 0
            trainer.run_step()
        steps.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
    largest = max(x.abs().max() for x in steps[0].values())
    difference = max((steps[1][n] - x).abs().max() for n, x in steps[0].items())
    assert largest > 1e-3 and difference <= 1e-5 * max(1.0, float(largest)), (largest, difference)


@pytest.mark.parametrize("kind", ["yaml"])  # tests of twins compare the kinds; this takes long
def test_a_run_has_the_steps_and_the_images_of_one_without_and_resumes_exactly(
    short_run, tmp_path, kind
):
    train(short_run("htc", kind, "plain"))
    train(short_run("htc", kind, "straight", KEYS[kind]))
    with pytest.raises(PowerFailure):
        train(failing_after(short_run("htc", kind, "broken", KEYS[kind]), batches=5))
    train(short_run("htc", kind, "broken", KEYS[kind]), resume=True)
    files = [tmp_path / f"{name}/model_final.pth" for name in ("straight", "broken")]
    assert same_tensors(*map(weights_of, files))
    lines = [
        [x for x in (tmp_path / name / "metrics.json").read_text().splitlines() if '"lr"' in x]
        for name in ("plain", "straight")
    ]
    assert len(lines[0]) == len(lines[1]) == 6
    first = [torch.tensor(eval(x[0])["total_loss"]) for x in lines]  # of the same weights
    torch.testing.assert_close(*first, rtol=1e-5, atol=0)
    assert [eval(x)["lr"] for x in lines[0]] == [eval(x)["lr"] for x in lines[1]]


def work(rank, folder):
    """One of two processes: its half of every batch, in two parts."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model, exchanged = DistributedDataParallel(Line()), []

    def count(state, bucket):
        exchanged.append(1)
        return (
            dist.all_reduce(bucket.buffer() / 2, async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    model.register_comm_hook(None, count)
    trainer = trained(folder, 2, [x[rank::2] for x in batches(3)], model)
    torch.save((trainer.model.module.state_dict(), len(exchanged)), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_processes_exchange_gradients_once_a_step(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    whole = trained(tmp_path, 1, batches(3)).model.state_dict()
    for rank in range(2):
        found, exchanged = torch.load(tmp_path / f"{rank}.pth")
        assert exchanged == 3
        for key in whole:
            torch.testing.assert_close(found[key], whole[key], rtol=0, atol=1e-6)
