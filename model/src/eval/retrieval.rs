//! Retrieval from long contexts, with generated tasks: the prompts and the score of RULER (Hsieh et al. 2024). Essays are the
//! haystack, and keys are made of their words.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{EvalModel, TextTokenizer};
use crate::checkpoint::uniform;
use crate::{Error, Result};

/// A kind of question.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// One needle.
    Single,
    /// One of four needles.
    MultiKey,
    /// All four values of one needle.
    MultiValue,
    /// All of four needles.
    MultiQuery,
    /// A chain of assignments.
    Variables,
    /// The most frequent words of a list.
    CommonWords,
}

impl Task {
    pub const ALL: [Self; 6] = [
        Task::Single,
        Task::MultiKey,
        Task::MultiValue,
        Task::MultiQuery,
        Task::Variables,
        Task::CommonWords,
    ];

    /// The name in the conf.
    pub fn name(self) -> &'static str {
        match self {
            Task::Single => "single",
            Task::MultiKey => "multi-key",
            Task::MultiValue => "multi-value",
            Task::MultiQuery => "multi-query",
            Task::Variables => "variables",
            Task::CommonWords => "common-words",
        }
    }

    /// The most tokens of a reply.
    fn max_reply_tokens(self) -> usize {
        match self {
            Task::Variables => 30,
            Task::CommonWords => 120,
            _ => 128,
        }
    }
}

/// A prompt, and the answers that the reply has to contain.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    pub prompt: String,
    pub answers: Vec<String>,
}

/// A question's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub task: Task,
    pub length: usize,
    pub sample: usize,
    pub prompt_tokens: usize,
    /// The BLAKE3 digest of the prompt's text.
    pub prompt: String,
    pub reply: String,
    pub answers: Vec<String>,
    /// The share of the answers that the reply contains.
    pub score: f64,
    #[serde(default)]
    pub seconds: f64,
}

/// Generates questions.
pub struct TaskGenerator<'a> {
    text: &'a TextTokenizer,
    seed: u64,
    sentences: Vec<String>,
    /// Distinct words of the essays.
    words: Vec<String>,
}

/// A seeded random number generator.
struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        ((uniform(self.seed, self.drawn) * n as f64) as usize).min(n - 1)
    }

    /// `n` distinct elements in random order.
    fn sample<T: Clone>(&mut self, of: &[T], n: usize) -> Vec<T> {
        let mut all = of.to_vec();
        for i in 0..n.min(all.len()) {
            let other = i + self.below(all.len() - i);
            all.swap(i, other);
        }
        all.truncate(n);
        all
    }

    /// `n` ascending indices at which to insert into a list of `length` elements.
    fn insertion_points(&mut self, n: usize, length: usize) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..n).map(|_| self.below(length + 1)).collect();
        indices.sort_unstable();
        indices
    }

    fn number(&mut self, digits: u32) -> String {
        let least = 10usize.pow(digits - 1);
        (least + self.below(9 * least)).to_string()
    }

    fn letters(&mut self, n: usize) -> String {
        (0..n).map(|_| char::from(b'A' + self.below(26) as u8)).collect()
    }
}

/// Inserts items into a list at ascending indices.
fn insert_at(list: &[String], items: &[String], indices: &[usize]) -> Vec<String> {
    let mut all = vec![];
    let mut next = items.iter().zip(indices).peekable();
    for i in 0..=list.len() {
        while let Some((item, _)) = next.next_if(|(_, index)| **index == i) {
            all.push(item.clone());
        }
        all.extend(list.get(i).cloned());
    }
    all
}

const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

impl<'a> TaskGenerator<'a> {
    /// # Errors
    /// The essays have too few words.
    pub fn new(text: &'a TextTokenizer, essays: &str, seed: u64) -> Result<Self> {
        let essays = essays.split_whitespace().collect::<Vec<_>>().join(" ");
        let sentences: Vec<String> = essays.split_inclusive(". ").map(|s| s.trim().to_owned()).collect();
        let plain = |word: &&str| word.len() >= 4 && word.bytes().all(|b| b.is_ascii_lowercase());
        let words: BTreeSet<&str> = essays.split(' ').filter(plain).collect();
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        if words.len() < 50 {
            return Err(Error::Conf("the haystack has too few different words to make keys of".into()));
        }
        Ok(Self { text, seed, sentences, words })
    }

    /// A task's question with the largest haystack that fits a length in tokens, including the reply.
    pub fn question(&self, task: Task, length: usize, sample: usize) -> Result<Question> {
        let mut best = self.shortest_question(task, length, sample)?;
        let fits = |size: usize| -> Result<Option<Question>> {
            let question = self.question_of_size(task, sample, size);
            Ok((self.total_tokens(task, &question)? <= length).then_some(question))
        };
        // Double the size until it no longer fits, then search between.
        let (mut low, mut high) = (1, 2);
        while let Some(question) = fits(high)? {
            (best, low, high) = (question, high, 2 * high);
        }
        while low + 1 < high {
            let middle = low.midpoint(high);
            match fits(middle)? {
                Some(question) => (best, low) = (question, middle),
                None => high = middle,
            }
        }
        Ok(best)
    }

    /// A task's question with the smallest haystack.
    ///
    /// # Errors
    /// The length has no room for it.
    pub fn shortest_question(&self, task: Task, length: usize, sample: usize) -> Result<Question> {
        let question = self.question_of_size(task, sample, 1);
        let (name, tokens) = (task.name(), self.total_tokens(task, &question)?);
        match tokens <= length {
            true => Ok(question),
            false => Err(Error::Conf(format!("{name} needs {tokens} tokens at least, and has {length}"))),
        }
    }

    /// The tokens of a question, including the reply.
    fn total_tokens(&self, task: Task, question: &Question) -> Result<usize> {
        Ok(self.text.ids(&question.prompt, true)?.len() + task.max_reply_tokens())
    }

    /// A task's question in a haystack of a size. The answers do not depend on the size.
    fn question_of_size(&self, task: Task, sample: usize, size: usize) -> Question {
        let seed = blake3::hash(format!("{} {} {sample}", self.seed, task.name()).as_bytes());
        let seed = u64::from_le_bytes(seed.as_bytes()[..8].try_into().expect("8 of 32 bytes"));
        let mut random = Random { seed, drawn: 0 };
        match task {
            Task::Single => self.needles(&mut random, size, [1, 1, 1]),
            Task::MultiKey => self.needles(&mut random, size, [4, 1, 1]),
            Task::MultiValue => self.needles(&mut random, size, [1, 4, 1]),
            Task::MultiQuery => self.needles(&mut random, size, [4, 1, 4]),
            Task::Variables => self.variables(&mut random, size),
            Task::CommonWords => self.common_words(&mut random, size),
        }
    }

    fn needles(&self, random: &mut Random, size: usize, [keys, values, queries]: [usize; 3]) -> Question {
        let words = random.sample(&self.words, 2 * keys);
        let keys: Vec<String> = words.chunks(2).map(|pair| pair.join("-")).collect();
        let of_keys: Vec<Vec<String>> =
            keys.iter().map(|_| (0..values).map(|_| random.number(7)).collect()).collect();
        let one =
            |key: &String, value: &String| format!("One of the special magic numbers for {key} is: {value}.");
        let needles: Vec<String> = keys
            .iter()
            .zip(&of_keys)
            .flat_map(|(key, values)| values.iter().map(move |value| one(key, value)))
            .collect();
        let needles = random.sample(&needles, needles.len());
        let asked = random.sample(&(0..keys.len()).collect::<Vec<_>>(), queries);
        let answers = asked.iter().flat_map(|i| of_keys[*i].clone()).collect();
        let names: Vec<&str> = asked.iter().map(|i| keys[*i].as_str()).collect();
        let query = match &names[..] {
            [all @ .., last] if !all.is_empty() => format!("{}, and {last}", all.join(", ")),
            all => all.concat(),
        };
        let haystack: Vec<String> = self.sentences.iter().cycle().take(size).cloned().collect();
        let indices = random.insertion_points(needles.len(), size);
        let context = insert_at(&haystack, &needles, &indices).join(" ");
        let prompt = if values * queries == 1 {
            format!(
                "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided text? The special magic number for {query} mentioned in the provided text is"
            )
        } else {
            format!(
                "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided text? The special magic numbers for {query} mentioned in the provided text are"
            )
        };
        Question { prompt, answers }
    }

    fn variables(&self, random: &mut Random, size: usize) -> Question {
        let mut one = |letters: usize, size: usize| {
            let mut names: Vec<String> = vec![];
            while names.len() < 5 {
                let name = random.letters(letters);
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            let value = random.number(5);
            let mut chain = vec![format!("VAR {} = {value}", names[0])];
            chain.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {}", pair[1], pair[0])));
            let indices = random.insertion_points(chain.len(), size);
            let context = insert_at(&vec![NOISE.to_owned(); size], &chain, &indices).join("\n");
            let prompt = format!(
                "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are:"
            );
            Question { prompt, answers: names }
        };
        // An answered example comes first, as in RULER.
        let example = one(3, 5);
        let Question { prompt, answers } = one(5, size);
        Question { prompt: format!("{} {}\n{prompt}", example.prompt, example.answers.join(" ")), answers }
    }

    /// `n` distinct words; pairs of words if the essays have too few.
    fn different(&self, random: &mut Random, n: usize) -> Vec<String> {
        let words = random.sample(&self.words, n.min(self.words.len()));
        let all = words.len();
        let pair = |i: usize| format!("{}-{}", words[i % all], words[i / all % all]);
        let more: Vec<String> = (all..n).map(pair).collect();
        words.into_iter().chain(more).collect()
    }

    fn common_words(&self, random: &mut Random, size: usize) -> Question {
        let mut one = |different: usize, often: usize, seldom: usize| {
            let words = self.different(random, 10 + different);
            let (common, others) = words.split_at(10);
            let repeated = |words: &[String], times: usize| vec![words; times].concat();
            let all = [repeated(common, often), repeated(others, seldom)].concat();
            let all = random.sample(&all, all.len());
            let numbered = |words: &[String]| -> String {
                let words = words.iter().enumerate();
                words.map(|(i, word)| format!("{}. {word}", i + 1)).collect::<Vec<_>>().join(" ")
            };
            let prompt = format!(
                "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n{}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:",
                numbered(&all)
            );
            (Question { prompt, answers: common.to_vec() }, numbered(common))
        };
        let (example, answered) = one(10, 3, 1);
        let (Question { prompt, answers }, _) = one(size, 30, 3);
        Question { prompt: format!("{} {answered}\n{prompt}", example.prompt), answers }
    }

    /// Asks a question.
    pub fn ask(&self, subject: &EvalModel, task: Task, length: usize, sample: usize) -> Result<Case> {
        let started = std::time::Instant::now();
        let Question { prompt, answers } = self.question(task, length, sample)?;
        let ids = self.text.ids(&prompt, true)?;
        let reply = self.text.text(&subject.reply(&ids, 0, task.max_reply_tokens())?.ids)?;
        Ok(Case {
            task,
            length,
            sample,
            prompt_tokens: ids.len(),
            prompt: blake3::hash(prompt.as_bytes()).to_hex().to_string(),
            score: score(&reply, &answers),
            reply: reply.trim().to_owned(),
            answers,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// The share of the answers that the reply contains, in any case: RULER's `string_match_all`.
pub fn score(reply: &str, answers: &[String]) -> f64 {
    let reply = reply.to_lowercase();
    let found = answers.iter().filter(|answer| reply.contains(&answer.to_lowercase())).count();
    found as f64 / answers.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::tests::words;

    #[test]
    fn the_score_is_the_share_of_answers_in_the_reply() {
        let answers = ["1234567", "ABCDE", "Walden"].map(str::to_owned);
        for (reply, found) in [
            ("they are 1234567, abcde and walden.", 3),
            ("1234567", 1),
            ("12345678 is not it, but has it", 1),
            ("none of them", 0),
            ("", 0),
        ] {
            assert_eq!(score(reply, &answers), f64::from(found) / 3.0, "{reply}");
        }
    }

    const ESSAYS: &str = include_str!("../../tests/essay.txt");

    #[test]
    fn what_is_asked_for_is_in_the_text_once_and_the_text_fits_its_length() {
        let text = words(ESSAYS);
        let tasks = TaskGenerator::new(&text, ESSAYS, 7).unwrap();
        for task in Task::ALL {
            for length in [2_000, 4_000] {
                let question = tasks.question(task, length, 2).unwrap();
                let tokens = text.ids(&question.prompt, true).unwrap().len() + task.max_reply_tokens();
                assert!(tokens <= length && tokens > length - 250, "{task:?} {tokens} of {length}");
                let wanted = if matches!(task, Task::Single | Task::MultiKey) { 1 } else { 4 };
                assert!(question.answers.len() >= wanted);
                let different: BTreeSet<&String> = question.answers.iter().collect();
                assert_eq!(different.len(), question.answers.len());
                if task == Task::CommonWords {
                    let list = question.prompt.split("most often.\n").nth(2).unwrap();
                    let list: Vec<&str> = list.split('\n').next().unwrap().split(' ').collect();
                    let times = |word: &str| list.iter().filter(|w| **w == word).count();
                    assert!(question.answers.iter().all(|word| times(word) == 30));
                } else {
                    let question_at = question.prompt.rfind("uestion:").unwrap_or(question.prompt.len());
                    let text = &question.prompt[..question_at];
                    for answer in &question.answers {
                        let defined = if task == Task::Variables {
                            format!("VAR {answer} =")
                        } else {
                            format!(": {answer}.")
                        };
                        assert_eq!(text.matches(&defined).count(), 1, "{task:?} {answer}");
                    }
                }
                assert_eq!(tasks.question(task, length, 2).unwrap(), question);
                assert_ne!(tasks.question(task, length, 3).unwrap(), question);
                assert_ne!(
                    TaskGenerator::new(&text, ESSAYS, 8).unwrap().question(task, length, 2).unwrap(),
                    question
                );
            }
        }
    }

    #[test]
    fn a_length_without_room_is_refused() {
        let text = words(ESSAYS);
        let tasks = TaskGenerator::new(&text, ESSAYS, 7).unwrap();
        let error = tasks.question(Task::Single, 50, 0).unwrap_err().to_string();
        assert!(error.contains("single needs ") && error.contains(" tokens at least, and has 50"), "{error}");
        assert!(TaskGenerator::new(&text, "too short", 7).is_err());
    }
}
