// The activations of `rwkv_core::ops::activation`, by number.
//use sigmoid

const IDENTITY: u32 = 0u;
const TANH: u32 = 1u;
const SIGMOID: u32 = 2u;
const SQUARED_RELU: u32 = 3u;

fn activate(activation: u32, x: f32) -> f32 {
    switch activation {
        case TANH: {
            // Beyond 10 it is 1 in f32, and on some drivers tanh of a large number is NaN.
            return tanh(clamp(x, -10.0, 10.0));
        }
        case SIGMOID: {
            return sigmoid(x);
        }
        case SQUARED_RELU: {
            let positive = max(x, 0.0);
            return positive * positive;
        }
        default: {
            return x;
        }
    }
}
