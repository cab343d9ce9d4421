//! The charts of the report: shapes are inline SVG, text is HTML.
//!
//! An SVG that is stretched to its panel would stretch its letters, too. So names, numbers and tick labels
//! stand beside it as text: they keep their size on a phone, and can be selected.

use super::text::{escape, percent};

/// About `about` round values that cover the range from `low` to `high`.
pub(super) fn ticks(low: f64, high: f64, about: usize) -> Vec<f64> {
    let rough = ((high - low) / about as f64).max(1e-9);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).floor(), (high / step).ceil().max((low / step).floor() + 1.0));
    (0..=(last - first).round() as u64).map(|i| (first + i as f64) * step).collect()
}

/// A tick's label, without trailing zeros: 0.5, 20, 1500.
pub(super) fn tick_label(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// An axis of shares, from 0 to a round percentage.
pub struct Axis {
    ticks: Vec<f64>,
}

impl Axis {
    /// An axis that covers the largest of some shares.
    pub fn of(shares: impl Iterator<Item = f64>) -> Self {
        Self { ticks: ticks(0.0, shares.fold(0.001, f64::max) * 100.0, 4) }
    }

    /// The position of a share on the axis, from 0 to 100.
    fn at(&self, share: f64) -> f64 {
        share * 1e4 / self.ticks[self.ticks.len() - 1]
    }

    /// The tick labels, for the row below a column of [`Axis::bars`].
    pub fn labels(&self) -> String {
        let labels = self.ticks.iter().map(|tick| {
            format!("<span style=\"left:{:.2}%\">{}</span>", self.at(tick / 100.0), tick_label(*tick))
        });
        format!("<div class=\"axis\" aria-hidden=\"true\">{}</div>", labels.collect::<String>())
    }

    /// A share before and after as two bars, one above the other, with a mark at its target.
    pub fn bars(&self, name: &str, before: f64, after: f64, target: Option<f64>) -> String {
        let aim = target.map(|t| format!(", target {} %", percent(t))).unwrap_or_default();
        let label = format!("{name}: corpus {} %{aim}, drawn {} %", percent(before), percent(after));
        let grid: String = self.ticks.iter().map(|t| upright("grid", self.at(t / 100.0))).collect();
        let mark = target.map(|t| upright("target", self.at(t))).unwrap_or_default();
        format!(
            "<svg class=\"bars\" viewBox=\"0 0 100 24\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{0}\">\
             <title>{0}</title>{grid}<rect class=\"before\" y=\"3\" width=\"{1:.2}\" height=\"8\"/>\
             <rect class=\"after\" y=\"13\" width=\"{2:.2}\" height=\"8\"/>{mark}</svg>",
            escape(&label),
            self.at(before),
            self.at(after),
        )
    }
}

fn upright(class: &str, x: f64) -> String {
    format!("<line class=\"{class}\" x1=\"{x:.2}\" x2=\"{x:.2}\" y1=\"0\" y2=\"24\"/>")
}

/// The legend of the bars.
pub fn legend(with_target: bool) -> String {
    let target = if with_target { " <span class=\"key target\">target</span>" } else { "" };
    format!(
        "<p class=\"legend\"><span class=\"key before\">corpus, before</span>{target} \
         <span class=\"key after\">drawn, after</span></p>"
    )
}

/// A distribution over the length buckets before and after, as a chart that fits a table cell.
pub fn sparkline(name: &str, buckets: &[&str], before: &[f64], after: &[f64]) -> String {
    const HEIGHT: f64 = 22.0;
    const PITCH: usize = 10;
    let most = before.iter().chain(after).copied().fold(0.001, f64::max);
    let bar = |class: &str, x: usize, share: f64| {
        let tall = share / most * HEIGHT;
        format!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{:.1}\" width=\"4\" height=\"{tall:.1}\"/>",
            HEIGHT - tall
        )
    };
    let pairs = before.iter().zip(after).enumerate();
    let bars: String =
        pairs.map(|(i, (b, a))| bar("before", i * PITCH, *b) + &bar("after", i * PITCH + 4, *a)).collect();
    let shares = buckets.iter().zip(before.iter().zip(after));
    let label: Vec<String> =
        shares.map(|(bucket, (b, a))| format!("{bucket} {} to {} %", percent(*b), percent(*a))).collect();
    format!(
        "<svg class=\"sparkline\" viewBox=\"0 0 {0} {HEIGHT}\" width=\"{0}\" height=\"{HEIGHT}\" role=\"img\" \
         aria-label=\"{1}\"><title>{1}</title>{bars}</svg>",
        buckets.len() * PITCH,
        escape(&format!("{name} by length: {}", label.join(", "))),
    )
}

/// More points than this cannot be told apart on a screen.
const MAX_POINTS: usize = 500;

/// At most `most` points: the means of groups of consecutive points, with the size of a group.
pub(super) fn thinned(points: &[(f64, f64)], most: usize) -> (usize, Vec<(f64, f64)>) {
    let group = points.len().div_ceil(most).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let (x, y) = chunk.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (x / chunk.len() as f64, y / chunk.len() as f64)
    };
    (group, points.chunks(group).map(mean).collect())
}

/// A quantity by step, as a line with labelled axes. Long series are drawn as means of groups. Empty if there
/// are fewer than two points.
pub fn curve(name: &str, class: &str, points: &[(f64, f64)]) -> String {
    let [first, .., last] = points else { return String::new() };
    let (group, drawn) = thinned(points, MAX_POINTS);
    let (low, high) =
        drawn.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), (_, y)| (l.min(*y), h.max(*y)));
    // the axis starts at 0, unless the training continues from a later step
    let start = if first.0 < last.0 * 0.1 { 0.0 } else { first.0 };
    let (across, up) = (ticks(start, last.0, 5), ticks(low, high, 4));
    let (bottom, top) = (up[0], up[up.len() - 1]);
    let x = |step: f64| (step - start) / (last.0 - start).max(1e-9) * 100.0;
    let y = |value: f64| (top - value) / (top - bottom) * 100.0;

    let line: Vec<String> = drawn.iter().map(|p| format!("{:.2},{:.2}", x(p.0), y(p.1))).collect();
    let grid: String = up
        .iter()
        .map(|t| format!("<line class=\"grid\" x1=\"0\" x2=\"100\" y1=\"{0:.2}\" y2=\"{0:.2}\"/>", y(*t)))
        .collect();
    let left: String = up
        .iter()
        .map(|t| format!("<span class=\"up\" style=\"top:{:.2}%\">{}</span>", y(*t), tick_label(*t)))
        .collect();
    let below: String = across
        .iter()
        .filter(|t| (0.0..=100.0).contains(&x(**t)))
        .map(|t| format!("<span class=\"across\" style=\"left:{:.2}%\">{}</span>", x(*t), tick_label(*t)))
        .collect();
    let means = if group > 1 { format!(", means of {group} steps") } else { String::new() };
    let caption = format!("{name}, by step{means}");
    let label =
        format!("{caption}: from {:.3} at step {} to {:.3} at step {}", first.1, first.0, last.1, last.0);
    format!(
        "<figure class=\"curve {class}\"><figcaption>{0}</figcaption><div class=\"plot\">\
         <svg viewBox=\"0 0 100 100\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{1}\"><title>{1}</title>\
         {grid}<polyline points=\"{2}\"/></svg>{left}{below}</div></figure>\n",
        escape(&caption),
        escape(&label),
        line.join(" "),
    )
}
