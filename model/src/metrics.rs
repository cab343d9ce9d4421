//! Training metrics: a line per step in `metrics.jsonl`, and the same values in a TensorBoard event file.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The metrics of one step, as in `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    pub step: u64,
    /// The mean over all targets of the step.
    pub loss: f64,
    /// The mean over the targets in each range of positions, by the range's name.
    pub loss_by_position: Map<String, Value>,
    /// The gradient norm before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// The fraction of the devices' peak, if the conf has `peak_tflops`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_fraction: Option<f64>,
    /// The largest peak memory of any rank on its device in bytes, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Seconds since the Unix epoch.
    pub seconds: f64,
}

/// The ranges of positions: names and ends.
pub const POSITION_RANGES: [(&str, usize); 7] = [
    ("0-512", 512),
    ("512-1K", 1 << 10),
    ("1K-4K", 4 << 10),
    ("4K-16K", 16 << 10),
    ("16K-64K", 64 << 10),
    ("64K-128K", 128 << 10),
    ("128K-", usize::MAX),
];

/// The index of the range that contains a position.
pub fn range_index(position: usize) -> usize {
    POSITION_RANGES.iter().position(|(_, end)| position < *end).unwrap_or(POSITION_RANGES.len() - 1)
}

/// A line of `metrics.jsonl`.
pub fn json_line(step: &StepMetrics) -> Vec<u8> {
    (serde_json::to_string(step).unwrap_or_default() + "\n").into_bytes()
}

/// The steps of a `metrics.jsonl`.
pub fn parse_steps(lines: &[u8]) -> Result<Vec<StepMetrics>, serde_json::Error> {
    lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice).collect()
}

/// A TensorBoard event file: TFRecords of `Event` messages.
pub fn tensorboard(steps: &[StepMetrics]) -> Vec<u8> {
    let mut file = vec![];
    // Field 3 of Event is the format's version.
    record(&mut file, &[&float64(1, steps.first().map_or(0.0, |s| s.seconds)), &bytes(3, b"brain.Event:2")]);
    for step in steps {
        let mut values = vec![];
        let mut value = |tag: &str, number: f64| {
            let value = [bytes(1, tag.as_bytes()), float32(2, number as f32)].concat();
            values.extend(bytes(1, &value));
        };
        value("loss", step.loss);
        for (range, loss) in &step.loss_by_position {
            value(&format!("loss/{range}"), loss.as_f64().unwrap_or(f64::NAN));
        }
        value("grad_norm", step.grad_norm);
        value("learning_rate", step.learning_rate);
        value("tokens", step.tokens as f64);
        value("tokens_per_second", step.tokens_per_second);
        step.peak_fraction.into_iter().for_each(|number| value("peak_fraction", number));
        step.memory_bytes.into_iter().for_each(|number| value("memory_bytes", number as f64));
        let number = [vec![2 << 3], varint(step.step)].concat();
        record(&mut file, &[&float64(1, step.seconds), &number, &bytes(5, &values)]);
    }
    file
}

/// A TFRecord: length and data, each with its masked CRC-32C.
fn record(file: &mut Vec<u8>, parts: &[&[u8]]) {
    let data = parts.concat();
    let masked =
        |bytes: &[u8]| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    let length = (data.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked(&length));
    file.extend(&data);
    file.extend(masked(&data));
}

// Fields of protocol buffers.

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = vec![];
    while number >= 128 {
        bytes.push(number as u8 | 128);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

fn bytes(field: u8, data: &[u8]) -> Vec<u8> {
    [vec![field << 3 | 2], varint(data.len() as u64), data.to_vec()].concat()
}

fn float64(field: u8, number: f64) -> Vec<u8> {
    [&[field << 3 | 1][..], &number.to_le_bytes()].concat()
}

fn float32(field: u8, number: f32) -> Vec<u8> {
    [&[field << 3 | 5][..], &number.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            loss: 1.5,
            loss_by_position: [("0-512".to_owned(), 1.5.into())].into_iter().collect(),
            grad_norm: 0.25,
            learning_rate: 1e-3,
            tokens: 300 * step,
            tokens_per_second: 10.0,
            peak_fraction: None,
            memory_bytes: None,
            seconds: 1e9,
        }
    }

    #[test]
    fn metrics_are_read_back_as_they_were_written() {
        let written = [step(1), step(2)];
        assert_eq!(parse_steps(&written.each_ref().map(json_line).concat()).unwrap(), written);
    }

    #[test]
    fn positions_are_in_the_range_that_their_name_says() {
        assert_eq!(
            [0, 511, 1024, 4096, 131_072].map(|p| POSITION_RANGES[range_index(p)].0),
            ["0-512", "0-512", "1K-4K", "4K-16K", "128K-"]
        );
    }

    /// The expected bytes are those of TensorFlow's own writer for an event with a step and a scalar, except for the time.
    #[test]
    fn an_event_file_is_records_of_length_data_and_their_sums() {
        let file = tensorboard(&[step(300)]);
        let mut rest = &file[..];
        let mut records = vec![];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + length];
            let masked = crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8);
            assert_eq!(rest[12 + length..16 + length], masked.to_le_bytes());
            records.push(data);
            rest = &rest[16 + length..];
        }
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // Step 300 as a varint, then the summary, whose first value is the loss.
        assert_eq!(records[1][9..12], [0x10, 0xac, 0x02]);
        let loss = [&b"\x0a\x0b\x0a\x04loss\x15"[..], &1.5f32.to_le_bytes()].concat();
        assert!(records[1].windows(loss.len()).any(|window| window == loss));
    }
}
