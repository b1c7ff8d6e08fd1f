// The portable code of attention, compiled for AVX2 and fused multiply-adds.
#define FOURFOLD_ATTENTION_KERNEL kAttentionAvx2
#include "attention_portable.cpp"
