//! Networks that several domains use.
//!
//! | module | network | weights of |
//! |---|---|---|
//! | [`unet2d`] | `UNet2DModel` | diffusers |
//! | [`guided_unet`] | `UNetModel`, `EncoderUNetModel`, `SuperResModel` | improved- and guided-diffusion |
//! | [`ncsnpp`] | `NCSNpp`, `DDPM` | score_sde_pytorch |
//! | [`song_unet`] | `SongUNet`, `DhariwalUNet` | EDM |
//! | [`dequantiser`] | coupling flow for variational dequantisation | – |
//! | [`vdm`] | `ScoreUNet` | VDM |

mod check;
mod input;
mod labels;

/// A flow for variational dequantisation.
pub mod dequantiser;
/// The U-Nets of improved-diffusion and guided-diffusion.
pub mod guided_unet;
/// The networks of the score SDE code: NCSN++, DDPM++, DDPM.
pub mod ncsnpp;
/// The networks of EDM.
pub mod song_unet;
/// The two-dimensional U-Net of `diffusers`' `UNet2DModel`.
pub mod unet2d;
/// The score network of VDM.
pub mod vdm;
