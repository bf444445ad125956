"""Region proposal networks by lineage: MMDetection's, and that of Faster R-CNN's Caffe release."""
