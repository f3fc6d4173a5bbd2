#pragma once
#include <cstddef>
#include <cstdint>

#include "int8_layout.h"
#include "running_top.h"

namespace zsad {

// tokens: [P, C], layer-normed; mean: [C], the same for all images that are to be multiplied with each other;
// near: products of tokens that lie near each other are to be the more exact, those of others may be less so;
// out: a buffer of layout.bytes bytes, aligned to 4 bytes and best to a cache line.
void int8_quantise_portable(const float* tokens, const float* mean, const Int8Layout& layout, bool near,
                            unsigned char* out);
void int8_quantise_avx2(const float*, const float*, const Int8Layout&, bool, unsigned char*);
void int8_quantise_avx512vnni(const float*, const float*, const Int8Layout&, bool, unsigned char*);
void int8_quantise_avx512amx(const float*, const float*, const Int8Layout&, bool, unsigned char*);

// left, right: P and Q patches of as many channels; gram: [P, Q] out, row p at gram + p * stride, stride at least Q in
// whole panels (the rest of a row's last panel is overwritten). Products of patches whose numbers are more than `apart`
// apart need not be there.
void int8_multiply_portable(const Int8Image& left, const Int8Image& right, float* gram, std::ptrdiff_t stride,
                            int apart);
void int8_multiply_avx2(const Int8Image&, const Int8Image&, float*, std::ptrdiff_t, int);
void int8_multiply_avx512vnni(const Int8Image&, const Int8Image&, float*, std::ptrdiff_t, int);
void int8_multiply_avx512amx(const Int8Image&, const Int8Image&, float*, std::ptrdiff_t, int);

// The same products go into the largest of every left patch instead of a Gram. right: the first of `count` images of as
// many patches each, one behind the other; kept.columns, of all of them, is at most count * Q.
void int8_running_top_portable(const Int8Image& left, const Int8Image& right, int count, const Kept& kept);
void int8_running_top_avx2(const Int8Image&, const Int8Image&, int, const Kept&);
void int8_running_top_avx512vnni(const Int8Image&, const Int8Image&, int, const Kept&);
void int8_running_top_avx512amx(const Int8Image&, const Int8Image&, int, const Kept&);

// The same products, of unit vectors, go into keys (gram_pass.h) of both sides' nearest instead of a Gram:
// best_left [P] and best_right [Q], both out; P and Q at most kMaxKeyPatches.
void int8_nearest_portable(const Int8Image& left, const Int8Image& right, float* best_left, float* best_right);
void int8_nearest_avx2(const Int8Image&, const Int8Image&, float*, float*);
void int8_nearest_avx512vnni(const Int8Image&, const Int8Image&, float*, float*);
void int8_nearest_avx512amx(const Int8Image&, const Int8Image&, float*, float*);

}  // namespace zsad
