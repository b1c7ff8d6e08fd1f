// Functions that are compiled for several instruction sets, the loader choosing through ifuncs, which glibc has; what
// they call must be inlined into each.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOURFOLD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define FOURFOLD_FMA_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define FOURFOLD_CLONES
#define FOURFOLD_FMA_CLONES
#endif
#define FOURFOLD_INLINE inline __attribute__((always_inline))
