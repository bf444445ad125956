"""The commands of `d2ext`, one module each; scripts in `tools/` and `demo/` run them too."""
