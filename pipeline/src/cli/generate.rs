//! `lengthwise generate`

use clap::Args;
use lengthwise_model::conf::Precision;
use lengthwise_model::device::DeviceName;
use lengthwise_model::generate::{GenerateJob, Sampling, generate};

use super::{out, run_folder};
use crate::algorithms::tokenizer::Tokenizer;
use crate::error::Doing;
use crate::{Error, Result};

#[derive(Args)]
#[command(
    after_help = "Example:\n  lengthwise generate RUN/checkpoint --prompt \"Once upon a time\" --tokens 50"
)]
pub struct GenerateArguments {
    /// The folder of a Hugging Face Llama with its tokenizer.json, such as a run's `checkpoint`
    checkpoint: String,
    /// The text to continue
    #[arg(long, required_unless_present = "prompt_file", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// … or the file that it is in
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<std::path::PathBuf>,
    /// How many tokens to add at most
    #[arg(long)]
    tokens: usize,
    /// Draw tokens by their probability to the power of 1 / T, rather than take the likeliest
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// What the draws of --temperature depend on
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print ids, one a line, rather than text
    #[arg(long)]
    ids: bool,
    /// "f32" or "bf16"
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// "flex", "libtorch-cpu" or "libtorch-cuda:0"
    #[arg(long, default_value = "flex")]
    device: String,
    /// How many ranks share the text
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
}

/// So many of the prompt's last tokens are looked at for the text of the first new one.
const AROUND: usize = 16;

fn sampling(arguments: &GenerateArguments) -> Result<Sampling> {
    match arguments.temperature {
        None => Ok(Sampling::Greedy),
        Some(temperature) if temperature.is_finite() && temperature > 0.0 => {
            Ok(Sampling::Temperature { temperature, seed: arguments.seed })
        }
        Some(temperature) => Err(Error::usage(
            format!("--temperature {temperature} is not a positive number"),
            "leave it out to take the likeliest token each time",
        )),
    }
}

pub async fn main(arguments: GenerateArguments) -> Result<()> {
    let at = run_folder(&arguments.checkpoint)?;
    let json = at.join("tokenizer.json");
    let Some(bytes) = json.get().await? else {
        let help = "copy the model's tokenizer.json beside its config.json";
        return Err(Error::usage(format!("there is no {}", json.url()), help));
    };
    let tokenizer = Tokenizer::from_json(&bytes, &json.url())?;
    let prompt = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).doing(|| format!("cannot read {}", path.display()))?
        }
        (None, None) => unreachable!("one of them is required"),
    };
    let mut ids = tokenizer.around()[0].clone();
    ids.extend(tokenizer.encode_plain(&prompt)?);
    let job = GenerateJob {
        checkpoint: (&at).into(),
        device: DeviceName::parse(&arguments.device)?,
        precision: arguments.precision,
        sampling: sampling(&arguments)?,
        ranks: usize::from(arguments.ranks),
        ids: ids.iter().map(|id| *id as i32).collect(),
        tokens: arguments.tokens,
    };
    // a token's text depends on those around it: what is new is what they say more with it than without
    let mut around = ids.split_off(ids.len().saturating_sub(AROUND));
    let mut said = tokenizer.decode(&around)?.len();
    // whatever ends it before its time: nobody reads on, or stdout is full
    let (end, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let say = |text: Result<String>| match text.and_then(out) {
        Ok(true) => {}
        // one is enough
        ends => drop(end.send(ends.map(drop))),
    };
    let mut on_token = |id| {
        if arguments.ids {
            return say(Ok(format!("{id}\n")));
        }
        around.push(id);
        match tokenizer.decode(&around) {
            // half a character waits for the rest of it
            Ok(text) if !text.ends_with('\u{FFFD}') => {
                say(Ok(text.get(said..).unwrap_or_default().to_owned()));
                said = text.len();
            }
            Ok(_) => {}
            Err(error) => say(Err(error.into())),
        }
    };
    let new = tokio::select! {
        biased;
        Some(end) = ended.recv() => return end,
        new = generate(&job, &mut on_token) => new?,
    };
    if let Ok(end) = ended.try_recv() {
        return end;
    }
    if !arguments.ids {
        out("\n")?;
    }
    tracing::info!("{} tokens", new.len());
    Ok(())
}
