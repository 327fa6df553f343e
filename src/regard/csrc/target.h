// Compile one translation unit for an instruction set without global -m flags: the rest of the library, and every other
// machine, stays on the baseline. A unit includes its standard headers first, then one of these blocks.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define REGARD_X86 1
#else
#define REGARD_X86 0
#endif

#define REGARD_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define REGARD_TARGET_BEGIN(isa) REGARD_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define REGARD_TARGET_END REGARD_PRAGMA(clang attribute pop)
#else
#define REGARD_TARGET_BEGIN(isa) REGARD_PRAGMA(GCC push_options) REGARD_PRAGMA(GCC target(isa))
#define REGARD_TARGET_END REGARD_PRAGMA(GCC pop_options)
#endif

#define REGARD_INLINE inline __attribute__((always_inline))
