//! The way through the modules.

use super::build::{PyramidIn, PyramidOut, ScoreUNet};
use super::config::{Combine, TimeEmbedding};
use crate::error::{Error, Result};
use crate::layer::{rescaled, timestep_embedding};
use crate::mode::Mode;
use crate::net::input::{halving, maps, times};
use candle_core::{DType, Tensor};
use diffusion_ops::{add, concat};

impl ScoreUNet {
    /// Runs the network.
    ///
    /// # Shapes
    /// `x [B, num_channels, H, W]`; `time_cond` a scalar, `[1]` or `[B]`: the noise level σ for
    /// Fourier features, the time (999 t for the continuous processes) for positional ones. The
    /// result has the shape of `x`.
    ///
    /// # Errors
    /// [`Error::Input`] if an input does not have such a shape, height and width do not halve evenly
    /// at every step down, or a time that is to be divided by has no noise level.
    pub fn forward(&self, x: &Tensor, time_cond: &Tensor, mode: Mode) -> Result<Tensor> {
        let (batch, height, width) = maps("x", x, self.config.data.num_channels)?;
        halving("x", (height, width), self.down.len() - 1)?;
        let time = times("time_cond", time_cond, batch)?;
        let temb = self.embed(&time)?;
        let temb = temb.as_ref();
        let x = x.to_dtype(self.dtype)?;
        let x = if self.config.data.centered {
            x
        } else {
            x.affine(2.0, -1.0)?
        };
        let (mut h, mut kept) = self.way_down(&x, temb, mode)?;
        let (first, attention, second) = &self.mid;
        h = first.forward(&h, temb, mode)?;
        h = second.forward(&attention.forward(&h)?, temb, mode)?;
        h = self.way_up(h, &mut kept, temb, mode)?;
        if let Some(out) = &self.out {
            h = out.forward(&h)?;
        }
        if self.config.model.scale_by_sigma {
            let sigma = self.levels(&time)?.to_dtype(self.dtype)?;
            h = h.broadcast_div(&sigma.reshape((batch, 1, 1, 1))?)?;
        }
        Ok(h)
    }

    /// The embedding of the time, `[B, 4 nf]`, where the network is told it.
    fn embed(&self, time: &Tensor) -> Result<Option<Tensor>> {
        let Some([first, second]) = &self.mlp else {
            return Ok(None);
        };
        let waves = match &self.fourier {
            Some(fourier) => fourier.forward(time)?,
            None => timestep_embedding(time, self.config.model.nf, false, 1.0, 1.0, 1e4)?
                .to_dtype(self.dtype)?,
        };
        let hidden = self.act.forward(&first.forward(&waves)?)?;
        Ok(Some(second.forward(&hidden)?))
    }

    /// The noise level of each time, `[B]`.
    fn levels(&self, time: &Tensor) -> Result<Tensor> {
        if self.embedding == TimeEmbedding::Fourier {
            return Ok(time.clone());
        }
        let index = time.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut levels = Vec::with_capacity(index.len());
        for t in index {
            // What is behind the point is cut off, as the authors do.
            let level = (t >= 0.0).then(|| self.sigmas.get(t as usize)).flatten();
            levels.push(*level.ok_or_else(|| Error::Input {
                name: "time_cond",
                found: t.to_string(),
                expected: format!("0 to {}, a step of the table", self.sigmas.len() - 1),
            })?);
        }
        Ok(Tensor::new(levels, time.device())?)
    }

    /// The map at the lowest resolution, and the maps that are kept for the way up.
    fn way_down(
        &self,
        x: &Tensor,
        temb: Option<&Tensor>,
        mode: Mode,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let mut picture = x.clone();
        let mut h = self.conv_in.forward(x)?;
        let mut kept = vec![h.clone()];
        for level in &self.down {
            for (block, attention) in &level.blocks {
                h = block.forward(&h, temb, mode)?;
                if let Some(attention) = attention {
                    h = attention.forward(&h)?;
                }
                kept.push(h.clone());
            }
            let Some((step, pyramid)) = &level.exit else {
                continue;
            };
            h = step.forward(&h, temb, mode)?;
            match pyramid {
                None => {}
                Some(PyramidIn::Skip { down, combine }) => {
                    picture = down.forward(&picture)?;
                    let part = combine.forward(&picture)?;
                    h = match self.combine {
                        Combine::Sum => add(&part, &h)?,
                        Combine::Cat => concat(&part, &h, 1)?,
                    };
                }
                Some(PyramidIn::Residual(down)) => {
                    picture = rescaled(add(&down.forward(&picture)?, &h)?, self.factor)?;
                    h = picture.clone();
                }
            }
            kept.push(h.clone());
        }
        Ok((h, kept))
    }

    /// The last map, or the picture that was built up on the way.
    fn way_up(
        &self,
        mut h: Tensor,
        kept: &mut Vec<Tensor>,
        temb: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let mut picture: Option<Tensor> = None;
        for level in &self.up {
            for block in &level.blocks {
                if let Some(skip) = kept.pop() {
                    h = concat(&h, &skip, 1)?;
                }
                h = block.forward(&h, temb, mode)?;
            }
            if let Some(attention) = &level.attention {
                h = attention.forward(&h)?;
            }
            match &level.pyramid {
                None => {}
                Some(PyramidOut::Skip { up, part }) => {
                    let part = part.forward(&h)?;
                    picture = Some(match (up, picture) {
                        (Some(up), Some(smaller)) => add(&up.forward(&smaller)?, &part)?,
                        _ => part,
                    });
                }
                Some(PyramidOut::First(part)) => picture = Some(part.forward(&h)?),
                Some(PyramidOut::Residual(up)) => {
                    if let Some(path) = picture {
                        h = rescaled(add(&up.forward(&path)?, &h)?, self.factor)?;
                    }
                    picture = Some(h.clone());
                }
            }
            if let Some(exit) = &level.exit {
                h = exit.forward(&h, temb, mode)?;
            }
        }
        Ok(match (&self.out, picture) {
            (None, Some(picture)) => picture,
            _ => h,
        })
    }
}
