// From a run-time dtype to a C++ type.
#pragma once

#include <c10/core/ScalarType.h>

// Call function<S>(...) with the C++ type S of `dtype`.
#define FASTVIT_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                             \
    case c10::ScalarType::BFloat16:            \
      function<c10::BFloat16>(__VA_ARGS__);    \
      break;                                   \
    case c10::ScalarType::Half:                \
      function<c10::Half>(__VA_ARGS__);        \
      break;                                   \
    default:                                   \
      function<float>(__VA_ARGS__);            \
      break;                                   \
  }
