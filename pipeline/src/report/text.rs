//! Formatting of numbers, names and tables in the report.

/// Escapes a text for an element or an attribute of HTML or SVG. Control characters, which neither allows,
/// are replaced.
pub fn escape(text: &str) -> String {
    text.replace(
        |c: char| (c.is_control() && !"\t\n\r".contains(c)) || "\u{fffe}\u{ffff}".contains(c),
        "\u{fffd}",
    )
    .replace('&', "&amp;")
    .replace('<', "&lt;")
    .replace('>', "&gt;")
    .replace('"', "&quot;")
    .replace('\'', "&#39;")
}

/// A number with narrow no-break spaces between thousands: 4 000 000.
pub fn number(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

/// A count with its noun: "1 domain", "5 domains".
pub fn count(n: u64, thing: &str) -> String {
    format!("{} {thing}{}", number(n), if n == 1 { "" } else { "s" })
}

/// A share in percent, without the percent sign.
pub fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

/// A difference of shares, in percentage points.
pub fn points(difference: f64) -> String {
    let text = format!("{:+.2}", difference * 100.0);
    if text == "-0.00" { "+0.00".to_owned() } else { text.replace('-', "\u{2212}") }
}

/// A size in decimal units, as the conf counts bytes.
pub fn bytes(n: u64) -> String {
    let units = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "KB")];
    match units.iter().find(|(size, _)| n >= *size) {
        Some((size, unit)) => format!("{:.1}\u{202f}{unit}", n as f64 / *size as f64),
        None => format!("{n} bytes"),
    }
}

/// A duration in the units that a person would use: 21 ms, 33.1 s, 12 min 5 s, 3 h 12 min.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1000.0),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// The first 12 digits of a key or a digest, escaped.
pub fn short(hash: &str) -> String {
    escape(&hash.chars().take(12).collect::<String>())
}

/// A cell of a table: its class in the style sheet, and its HTML.
#[derive(Clone)]
pub struct Cell {
    class: &'static str,
    html: String,
}

/// A cell with a name or a sentence, which is escaped here.
pub fn words(text: &str) -> Cell {
    Cell { class: "words", html: escape(text) }
}

/// A cell with a shortened key, digest or id, which is escaped here.
pub fn code(text: &str) -> Cell {
    Cell { class: "words code", html: escape(text) }
}

/// A cell with a number that one of the functions above formatted.
pub fn figure(number: impl Into<String>) -> Cell {
    Cell { class: "figure", html: number.into() }
}

/// A cell with a number that is highlighted.
pub fn flagged(number: impl Into<String>) -> Cell {
    figure(format!("<span class=\"far\">{}</span>", number.into()))
}

/// A cell with a chart of [`super::charts`].
pub fn drawing(svg: String) -> Cell {
    Cell { class: "drawing", html: svg }
}

/// A table that scrolls inside its panel if it is too large. Each row begins with its name, and a heading is
/// aligned like the cells below it. Empty if there are no rows.
pub fn table(label: &str, headings: &[&str], rows: &[Vec<Cell>], foot: Option<Vec<Cell>>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: String = headings
        .iter()
        .zip(&rows[0])
        .map(|(heading, cell)| format!("<th scope=\"col\" class=\"{}\">{}</th>", cell.class, escape(heading)))
        .collect();
    let body: String = rows.iter().map(|row| line(row)).collect();
    let foot = foot.map(|row| format!("<tfoot>{}</tfoot>", line(&row))).unwrap_or_default();
    format!(
        "<div class=\"scroll\" role=\"region\" aria-label=\"{}\" tabindex=\"0\"><table>\
         <thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>{foot}</table></div>\n",
        escape(label)
    )
}

fn line(row: &[Cell]) -> String {
    let cells = row.iter().enumerate().map(|(i, Cell { class, html })| match i {
        0 => format!("<th scope=\"row\" class=\"{class}\"><span>{html}</span></th>"),
        _ => format!("<td class=\"{class}\">{html}</td>"),
    });
    format!("<tr>{}</tr>\n", cells.collect::<String>())
}
