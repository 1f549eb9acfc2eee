//! The networks of the score SDE code (Song et al. 2021): NCSN++, DDPM++ and DDPM, with the authors'
//! configuration files and the names of their weights (`all_modules.N`).
//!
//! | file | what |
//! |---|---|
//! | `config` | sizes and choices |
//! | `parts` | residual blocks, attention, changes of resolution |
//! | `build` | the list of modules in the authors' order |
//! | `run` | the way through them |

mod build;
mod config;
mod parts;
mod run;

pub use build::ScoreUNet;
pub use config::{
    Combine, Progressive, ProgressiveInput, ResBlockType, ScoreConfig, ScoreDataConfig,
    ScoreModelConfig, ScoreNetwork, TimeEmbedding,
};
