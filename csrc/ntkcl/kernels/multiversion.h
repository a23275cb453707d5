#pragma once

// NTKCL_MULTIVERSION before a function compiles it for AVX-512, AVX2 and the baseline; the loader
// picks one for the machine at hand. All give the same bits: no fused multiply-add, no
// re-association. What such a function calls must be NTKCL_INLINE, or it stays baseline code.
// Sanitizers instrument the picking itself, which runs too early for them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NTKCL_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NTKCL_MULTIVERSION
#endif
#define NTKCL_INLINE inline __attribute__((always_inline))
