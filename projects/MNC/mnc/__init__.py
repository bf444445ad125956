"""Multi-task Network Cascades (Dai, He, Sun, CVPR 2016, arXiv:1512.04412)."""
