// The activations of gated layers. Included as vector.h is.

MAX_INLINE Vec silu(Vec x) { return x / (exponential(-x) + 1.0f); }

// GELU with tanh instead of the error function, arXiv:1606.08415: 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2 u)).
MAX_INLINE Vec gelu_tanh(Vec x) {
  const Vec twice_u = x * multiply_add(x * x, broadcast(0.0713548163f), broadcast(1.59576912f));
  return x / (exponential(-twice_u) + 1.0f);
}

// x times the normal distribution's share below x. The share of a tail is exp(-z * z) times a polynomial in
// 1 / (1 + z / 2), fitted to a relative error of 5e-8, so that it stays exact where it is small.
MAX_INLINE Vec gelu_erf(Vec x) {
  const Vec z = (x < 0.0f ? -x : x) * 0.707106781f;
  const Vec t = 1.0f / (z * 0.5f + 1.0f);
  Vec p = broadcast(-0.0593638965f);
  p = multiply_add(p, t, broadcast(0.286014241f));
  p = multiply_add(p, t, broadcast(-0.490180125f));
  p = multiply_add(p, t, broadcast(0.281475811f));
  p = multiply_add(p, t, broadcast(-0.0289723498f));
  p = multiply_add(p, t, broadcast(0.20367862f));
  p = multiply_add(p, t, broadcast(0.242853588f));
  p = multiply_add(p, t, broadcast(0.282409595f));
  p = multiply_add(p, t, broadcast(0.282084471f));
  const Vec tail = p * t * exponential(-z * z) * 0.5f;
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

MAX_INLINE Vec activated(Epilogue epilogue, Vec gate) {
  if (epilogue == Epilogue::kSwiglu) return silu(gate);
  return epilogue == Epilogue::kGegluTanh ? gelu_tanh(gate) : gelu_erf(gate);
}
