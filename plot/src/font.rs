//! The font of the bitmaps.

use anyhow::{Context, Result, anyhow};
use plotters::style::FontStyle;

/// Debian's fonts-dejavu-core; the bitmap needs a font, an SVG's viewer brings its own.
const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";

/// The family under which every plot asks for the font.
pub const FAMILY: &str = "sans-serif";

/// Makes the font known to plotters, before anything is drawn.
///
/// # Errors
/// When the font of Debian's package fonts-dejavu-core cannot be read.
pub fn register_font() -> Result<()> {
    let font = std::fs::read(FONT)
        .with_context(|| format!("read {FONT} (Debian package fonts-dejavu-core)"))?;
    // plotters keeps fonts for the life of the process, and a process draws once or twice.
    let font = Box::leak(font.into_boxed_slice());
    plotters::style::register_font(FAMILY, FontStyle::Normal, font)
        .map_err(|_| anyhow!("{FONT} is not a font that can be read"))
}
