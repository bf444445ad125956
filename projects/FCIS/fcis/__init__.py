"""Fully Convolutional Instance-aware Semantic Segmentation (Li et al., CVPR 2017,
arXiv:1611.07709)."""
