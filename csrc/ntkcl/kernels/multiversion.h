#pragma once

// NTKCL_MULTIVERSION before a function compiles it for AVX-512, AVX2 and the baseline; the loader
// picks one for the machine at hand. All give the same bits: no re-association and, but for
// attention, its matrix products and GELU, no fused multiply-add. What such a function calls must
// be NTKCL_INLINE, or it stays baseline code.
// Sanitizers instrument the picking itself, which runs too early for them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NTKCL_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NTKCL_MULTIVERSION
#endif
#define NTKCL_INLINE inline __attribute__((always_inline))
#define NTKCL_INLINE_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

// For code whose shape depends on the vector width: a function of its own for each, picked by hand.
#if defined(__x86_64__) && defined(__GNUC__)
#define NTKCL_X86_VERSIONS
#define NTKCL_X86_V4 __attribute__((target("arch=x86-64-v4")))
#define NTKCL_X86_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define NTKCL_X86_AMX __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))
#define NTKCL_X86_V3 __attribute__((target("arch=x86-64-v3")))
namespace ntkcl::kernels {
inline bool has_x86_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
inline bool has_x86_v4() {
  return has_x86_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_x86_bf16() {
  return has_x86_v4() && __builtin_cpu_supports("avx512bf16");
}
}  // namespace ntkcl::kernels
#else
namespace ntkcl::kernels {
inline bool has_x86_bf16() {
  return false;
}
}  // namespace ntkcl::kernels
#endif
