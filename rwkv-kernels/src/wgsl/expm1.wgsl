// exp(x) - 1 for x in [-0.6066, 0], the range of the logarithm of a decay.
//
// exp(x) - 1.0 as written would keep nothing of a slow decay: near 1 floats lie 2^-24 apart. This is
// x + x^2 p(x), p the Taylor polynomial up to x^9 / 9!.
//
// Relative error, with E = expm1(x), |E| >= 0.7497 |x|, and every operation off by u at most, relatively:
//   truncation   the series alternates: <= |x|^10 / 10! / |E| <= 0.6066^9 / (10! * 0.7497) < 4.1e-9
//   p            1/2 is exact, the rest of p <= 0.21 p and off by < 3.5 u, the last addition u: < 1.75 u
//   x * (x * p)  3.75 u of x^2 p, and |x^2 p / E| <= (0.6066 - 0.4547) / 0.4547 < 0.335: < 1.26 u
//   the sum      u
// Together < 2.26 u + 4.1e-9. WGSL lets a sum or product round either way, u = 2^-23: < 2.8e-7. (Rounding
// to nearest, u = 2^-24: < 1.4e-7.) Where x^2 underflows the result is x, off by |x| / 2.
fn expm1(x: f32) -> f32 {
    var p = 1.0 / 362880.0;
    p = p * x + 1.0 / 40320.0;
    p = p * x + 1.0 / 5040.0;
    p = p * x + 1.0 / 720.0;
    p = p * x + 1.0 / 120.0;
    p = p * x + 1.0 / 24.0;
    p = p * x + 1.0 / 6.0;
    p = p * x + 1.0 / 2.0;
    return x + x * (x * p);
}
