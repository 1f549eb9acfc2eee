//! Layers, one a file, with the parameter names of `diffusers` unless they say otherwise.

mod activation;
mod attention;
mod conv1d;
mod conv2d;
mod diagonal_gaussian;
mod downsample;
mod embedding;
mod fir;
mod gaussian_fourier;
mod group_norm;
mod initial;
mod layer_norm;
mod linear;
mod nin;
mod qkv_attention;
mod resnet_block;
mod sincos_position;
mod timestep_embedding;
mod transformer;
mod upsample;

pub use activation::Activation;
pub(crate) use attention::rescaled;
pub use attention::{Attention, AttentionConfig};
pub use conv1d::{Conv1d, Conv1dConfig};
pub use conv2d::{Conv2d, Conv2dConfig};
pub use diagonal_gaussian::DiagonalGaussian;
pub use diffusion_ops::timestep_embedding;
pub use downsample::{Downsample2D, fir_downsample2d};
pub use embedding::Embedding;
pub use fir::{Fir, upfirdn2d};
pub use gaussian_fourier::GaussianFourier;
pub use group_norm::GroupNorm;
pub use initial::Initial;
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use nin::Nin;
pub(crate) use qkv_attention::Pointwise;
pub use qkv_attention::{QkvAttention, QkvAttentionConfig, QkvOrder};
pub use resnet_block::{
    Resample, ResnetBlock2D, ResnetBlock2DConfig, ResnetNames, Shortcut, TimeEmbeddingNorm,
};
pub use sincos_position::sincos_position_2d;
pub use timestep_embedding::{TimestepEmbedding, TimestepEmbeddingConfig};
pub use transformer::{TransformerEncoderLayer, TransformerEncoderLayerConfig};
pub(crate) use upsample::nearest;
pub use upsample::{Upsample2D, fir_upsample2d};
