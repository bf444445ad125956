// A module, so that the extension can be imported as well as loaded; it tells for which GPUs it was built.
// The kernels of the schemas that d2ext/ops defines are registered where they stand.
#include <Python.h>

#define D2EXT_TEXT(...) #__VA_ARGS__
#define D2EXT_TEXT_OF(...) D2EXT_TEXT(__VA_ARGS__)
#ifndef D2EXT_ARCHITECTURES  // by setup.py: 8.0,9.0+PTX
#define D2EXT_ARCHITECTURES
#endif

extern "C" {
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr) {
    PyModule_AddStringConstant(made, "ARCHITECTURES", D2EXT_TEXT_OF(D2EXT_ARCHITECTURES));
  }
  return made;
}
}
