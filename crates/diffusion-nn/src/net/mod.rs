//! Networks that several domains use.

/// The two-dimensional U-Net of `diffusers`' `UNet2DModel`.
pub mod unet2d;
