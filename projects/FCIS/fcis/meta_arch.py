"""The detector of FCIS: a Generalized R-CNN whose regions vote for the final masks in the image."""

from collections.abc import Callable

from d2ext.modeling import ReproducibleRCNN
from d2ext.projects.fcis.postprocessing import paste_instances, scale_boxes, vote_instances
from d2ext.projects.fcis.test_time_augmentation import FCISWithTTA

from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import Instances


@META_ARCH_REGISTRY.register()
class FCIS(ReproducibleRCNN):
    """Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017).

    Inputs and outputs are those of GeneralizedRCNN. Masks are voted for at the resolution of the
    output, `height` and `width` of an input, as in the release. `inference_stages` gives the
    results without and with the regions that the box branch has moved.
    """

    def candidates(self, batched_inputs: list[dict]) -> list[Instances]:
        """The scored regions of each image before suppression and voting; see
        `FCISROIHeads.candidates`. Test-time augmentation lets several such pools vote."""
        return self.predict_stages(batched_inputs)[0][-1]

    def with_test_time_augmentation(self, tta_mapper: Callable[[dict], list[dict]]) -> FCISWithTTA:
        """This network on several versions of each image, whose regions vote together."""
        return FCISWithTTA(self, tta_mapper)

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """As in GeneralizedRCNN. Without post-processing there is no voting: the results are
        regions after suppression with `pred_masks` (R x 1 x P x P probabilities)."""
        assert not self.training
        if detected_instances is None and do_postprocess and self.roi_heads.vote:
            results = self.candidates(batched_inputs)
        else:
            results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        return self._postprocess(results, batched_inputs, [r.image_size for r in results])

    def _postprocess(self, instances: list[Instances], batched_inputs: list[dict], image_sizes):
        """Detections in the output images, of candidates (by voting) or of detections."""
        voting = self.roi_heads.voting
        outputs = []
        for found, x, size in zip(instances, batched_inputs, image_sizes):
            output_size = (x.get("height", size[0]), x.get("width", size[1]))
            if found.has("class_probs"):
                boxes = scale_boxes(found.pixel_boxes, size, output_size)
                result = vote_instances(
                    boxes, found.class_probs, found.pred_masks[:, 0], output_size, voting
                )
            else:
                result = paste_instances(found, output_size, voting.binary_threshold)
            outputs.append({"instances": result})
        return outputs
