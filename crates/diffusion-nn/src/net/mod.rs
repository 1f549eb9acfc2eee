//! Networks that several domains use.
//!
//! | module | network | weights of |
//! |---|---|---|
//! | [`unet2d`] | `UNet2DModel` | diffusers |
//! | [`guided_unet`] | `UNetModel`, `EncoderUNetModel`, `SuperResModel` | improved- and guided-diffusion |

mod check;
mod input;

/// The U-Nets of improved-diffusion and guided-diffusion.
pub mod guided_unet;
/// The two-dimensional U-Net of `diffusers`' `UNet2DModel`.
pub mod unet2d;
