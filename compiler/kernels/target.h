// Compiles the rest of a file for a larger instruction set than the library's. Build tools have no flags per file.
#pragma once

#define MAX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MAX_TARGET(features) \
  MAX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MAX_TARGET_END _Pragma("clang attribute pop")
#else
// Not popped: templates are compiled at the end of the file, under what is in force there.
#define MAX_TARGET(features) MAX_PRAGMA(GCC target(features))
#define MAX_TARGET_END
#endif
