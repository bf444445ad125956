// An empty module, so that the extension can be imported as well as loaded. The kernels of the schemas
// that d2ext/ops defines are registered where they stand.
#include <Python.h>

extern "C" {
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module);
}
}
