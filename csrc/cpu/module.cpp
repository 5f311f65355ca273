// The Python module megapar._C. Importing it runs the static initialisers that register the kernels with torch; it holds nothing itself.

#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
