// Registers the kernels for the schemas that d2ext/ops defines in Python, and an empty module so that
// the file can be imported as well as loaded.
#include <Python.h>
#include <torch/library.h>

#include "kernels.h"

TORCH_LIBRARY_IMPL(d2ext, CPU, library) {
  D2EXT_REGISTER(library, cpu)
}

#ifdef D2EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(d2ext, CUDA, library) {
  D2EXT_REGISTER(library, cuda)
}
#endif

extern "C" {
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module);
}
}
