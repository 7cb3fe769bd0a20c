// Makes the library a module that Python can import; loading it registers the ops of csrc/cpu (see tensors.h).
#include <Python.h>

#include "../csrc/cpu/tensors.h"

#define ST_INIT_OF(name) PyInit_##name
#define ST_INIT(name) ST_INIT_OF(name)

PyMODINIT_FUNC ST_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, ST_TEXT(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
