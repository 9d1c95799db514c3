// Sine and cosine without branches and calls: a CPU compiler can vectorise them, and a GPU needs no stack for them.
#pragma once
#include <cmath>

#include "host_device.h"

namespace minivlm {

// Cody and Waite 1980: take away the nearest multiple of pi/2, then Taylor's series on what is left, |r| <= pi/4. The
// reduction is in double, with pi/2 in two parts, the first of 33 bits, so that n * high is exact for every angle up to
// 2^20 and good to 1e-9 up to 2^24. The series is in A, and as long as A has bits.
template <class A>
MINIVLM_BOTH inline void sincos(float angle, A& sine, A& cosine) {
  const double half_pi_high = 0x1.921fb544p0, half_pi_low = 0x1.0b4611a626331p-34;
  const double n = rint(double(angle) * 0x1.45f306dc9c883p-1);  // angle / (pi/2)
  const A r = A((double(angle) - n * half_pi_high) - n * half_pi_low), s = r * r;
  A odd = A(1. / 362880), even = A(1. / 40320);  // 1/9! and 1/8!
  if (sizeof(A) > 4) {
    const A thirteenth = A(1. / 6227020800), fifteenth = A(-1. / 1307674368000), seventeenth = A(1. / 355687428096000);
    const A twelfth = A(1. / 479001600), fourteenth = A(-1. / 87178291200), sixteenth = A(1. / 20922789888000);
    odd += s * (A(-1. / 39916800) + s * (thirteenth + s * (fifteenth + s * seventeenth)));
    even += s * (A(-1. / 3628800) + s * (twelfth + s * (fourteenth + s * sixteenth)));
  }
  odd = r + r * s * (A(-1. / 6) + s * (A(1. / 120) + s * (A(-1. / 5040) + s * odd)));
  even = 1 + s * (A(-1. / 2) + s * (A(1. / 24) + s * (A(-1. / 720) + s * even)));
  const int quadrant = int(n) & 3;  // of the angle: (sin, cos), (cos, -sin), (-sin, -cos), (-cos, sin)
  const A sine_size = quadrant & 1 ? even : odd, cosine_size = quadrant & 1 ? odd : even;
  sine = quadrant & 2 ? -sine_size : sine_size;
  cosine = (quadrant + 1) & 2 ? -cosine_size : cosine_size;
}

}  // namespace minivlm
