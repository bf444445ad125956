"""HTC R-101-FPN, 20 epochs; published: box AP 44.8, mask AP 39.6."""

from .htc_R_50_FPN_20e_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
# torchvision's resnet101 in detectron2's names (detectron2's tools/convert-torchvision-to-d2.py).
train.init_checkpoint = "weights/R-101-torchvision.pkl"
train.output_dir = "./output/htc_R_101_FPN_20e_coco"
