//! sequences: lays out fragments of documents in sequences, end to end (concat) or by best fit.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::Serialize;

use crate::conf::Mode;

/// How sequences are laid out.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Layout {
    pub sequence_tokens: usize,
    pub sequences_per_file: usize,
    pub mode: Mode,
    /// Whether BOS goes before every document, and EOS after it.
    pub bos: bool,
    pub eos: bool,
}

/// A run of ids in the packed dataset: BOS if any, tokens `[start, stop)` of a document, EOS if any.
#[derive(Clone, Debug, PartialEq)]
pub struct Fragment {
    pub doc_id: [u8; 16],
    pub domain: Arc<str>,
    pub part: i64,
    pub start: i64,
    pub stop: i64,
    pub bos: bool,
    pub eos: bool,
}

impl Fragment {
    /// Its length in ids, BOS and EOS included.
    pub fn ids(&self) -> usize {
        (self.stop - self.start) as usize + self.bos as usize + self.eos as usize
    }

    /// Cuts off the first `ids` ids and returns them.
    fn take(&mut self, ids: usize) -> Fragment {
        let mut head = self.clone();
        if ids >= self.ids() {
            (self.start, self.bos, self.eos) = (self.stop, false, false);
            return head;
        }
        if ids == 0 {
            head = Fragment { stop: self.start, bos: false, eos: false, ..head };
            return head;
        }
        // the head is not the whole fragment: it takes the BOS, and the EOS stays with the rest
        head.eos = false;
        head.stop = self.start + (ids - self.bos as usize) as i64;
        (self.start, self.bos) = (head.stop, false);
        head
    }
}

/// A planned sequence: fragments that fill it from the left, and a fragment of the one id that follows it,
/// the label of its last position. There is no label if no id follows.
#[derive(Debug, PartialEq)]
pub struct Sequence {
    pub fragments: Vec<Fragment>,
    pub label: Option<Fragment>,
}

/// Lays out fragments in sequences. Fragments are pushed in training order; sequences are popped once they
/// are ready.
pub struct Planner {
    layout: Layout,
    /// concat: the sequence being filled; best fit: the window being gathered.
    open: Vec<Fragment>,
    open_ids: usize,
    /// concat: a full sequence that waits for the id after it, its label.
    full: Option<Vec<Fragment>>,
    /// Sequences that are ready.
    ready: VecDeque<Sequence>,
}

/// Best fit works on a window of fragments that fill about this many sequences. The window is large enough to
/// fill sequences well, and small enough to nearly keep the training order.
const WINDOW_SEQUENCES: usize = 256;
/// A window also ends at this many fragments.
const WINDOW_FRAGMENTS: usize = 65_536;

impl Planner {
    pub fn new(layout: Layout) -> Self {
        Self { layout, open: vec![], open_ids: 0, full: None, ready: VecDeque::new() }
    }

    /// Adds the next fragment of the training order.
    pub fn push(&mut self, mut fragment: Fragment) {
        if fragment.ids() == 0 {
            return;
        }
        let size = self.layout.sequence_tokens;
        if self.layout.mode == Mode::BestFit {
            // only a fragment longer than a sequence is cut; the label of each full piece is the id that
            // follows it
            while fragment.ids() > size {
                let head = fragment.take(size);
                self.ready
                    .push_back(Sequence { fragments: vec![head], label: Some(fragment.clone().take(1)) });
            }
            self.open_ids += fragment.ids();
            self.open.push(fragment);
            if self.open_ids >= WINDOW_SEQUENCES * size || self.open.len() >= WINDOW_FRAGMENTS {
                self.fit();
            }
            return;
        }
        while fragment.ids() > 0 {
            if let Some(fragments) = self.full.take() {
                self.ready.push_back(Sequence { fragments, label: Some(fragment.clone().take(1)) });
            }
            let head = fragment.take(size - self.open_ids);
            self.open_ids += head.ids();
            self.open.push(head);
            if self.open_ids == size {
                self.full = Some(std::mem::take(&mut self.open));
                self.open_ids = 0;
            }
        }
    }

    /// Ends the input. Returns the fragments that did not fill a sequence; with best fit there are none.
    pub fn finish(&mut self) -> Vec<Fragment> {
        if self.layout.mode == Mode::BestFit {
            self.fit();
            return vec![];
        }
        if let Some(fragments) = self.full.take() {
            let label = self.open.first().map(|fragment| fragment.clone().take(1));
            self.ready.push_back(Sequence { fragments, label });
        }
        self.open_ids = 0;
        std::mem::take(&mut self.open)
    }

    /// The next sequence that is ready, if any.
    pub fn pop(&mut self) -> Option<Sequence> {
        self.ready.pop_front()
    }

    /// Best-fit decreasing over the window: the longest fragments first, each into the fullest sequence that
    /// has room for it.
    fn fit(&mut self) {
        let window = std::mem::take(&mut self.open);
        self.open_ids = 0;
        let mut by_length: Vec<usize> = (0..window.len()).collect();
        by_length.sort_by_key(|i| (std::cmp::Reverse(window[*i].ids()), *i));
        let mut sequences: Vec<Vec<usize>> = vec![];
        let mut rooms: std::collections::BTreeSet<(usize, usize)> = Default::default();
        for i in by_length {
            let ids = window[i].ids();
            let fits = rooms.range((ids, 0)..).next().copied();
            let (room, sequence) = fits.unwrap_or_else(|| {
                sequences.push(vec![]);
                (self.layout.sequence_tokens, sequences.len() - 1)
            });
            rooms.remove(&(room, sequence));
            sequences[sequence].push(i);
            if room > ids {
                rooms.insert((room - ids, sequence));
            }
        }
        // restore the training order: sequences are sorted by their earliest fragment
        sequences.iter_mut().for_each(|sequence| sequence.sort_unstable());
        sequences.sort_unstable();
        let mut window: Vec<Option<Fragment>> = window.into_iter().map(Some).collect();
        for sequence in sequences {
            let fragments = sequence.into_iter().map(|i| window[i].take().expect("placed once")).collect();
            self.ready.push_back(Sequence { fragments, label: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(mode: Mode, bos: bool, eos: bool) -> Layout {
        Layout { sequence_tokens: 16, sequences_per_file: 3, mode, bos, eos }
    }

    fn fragments(lengths: &[(i64, i64)], layout: Layout) -> Vec<Fragment> {
        let fragment = |(i, (start, length)): (usize, &(i64, i64))| Fragment {
            doc_id: [i as u8; 16],
            domain: "d".into(),
            part: 0,
            start: *start,
            stop: start + length,
            bos: layout.bos && *start == 0,
            eos: layout.eos,
        };
        lengths.iter().enumerate().map(fragment).collect()
    }

    /// Every id of a fragment as (document, position), where -1 stands for BOS and -2 for EOS.
    fn ids(fragment: &Fragment) -> Vec<(u8, i64)> {
        let mut ids = vec![];
        ids.extend(fragment.bos.then_some(-1));
        ids.extend(fragment.start..fragment.stop);
        ids.extend(fragment.eos.then_some(-2));
        ids.into_iter().map(|at| (fragment.doc_id[0], at)).collect()
    }

    fn planned(input: &[Fragment], layout: Layout) -> (Vec<Sequence>, Vec<Fragment>) {
        let mut planner = Planner::new(layout);
        let mut sequences = vec![];
        for fragment in input {
            planner.push(fragment.clone());
            sequences.extend(std::iter::from_fn(|| planner.pop()));
        }
        let rest = planner.finish();
        sequences.extend(std::iter::from_fn(|| planner.pop()));
        (sequences, rest)
    }

    proptest! {
        #[test]
        fn concat_lays_all_ids_end_to_end_and_labels_with_the_next(
            lengths in prop::collection::vec((0i64..2, 1i64..60), 0..40), bos: bool, eos: bool,
        ) {
            let layout = layout(Mode::Concat, bos, eos);
            let input = fragments(&lengths, layout);
            let stream: Vec<_> = input.iter().flat_map(ids).collect();
            let (sequences, rest) = planned(&input, layout);
            let out: Vec<_> = sequences.iter().flat_map(|s| &s.fragments).chain(&rest).flat_map(ids).collect();
            prop_assert_eq!(&out, &stream);
            prop_assert_eq!(sequences.len(), stream.len() / 16);
            for (i, sequence) in sequences.iter().enumerate() {
                prop_assert_eq!(sequence.fragments.iter().map(Fragment::ids).sum::<usize>(), 16);
                let label = sequence.label.as_ref().map(ids);
                prop_assert_eq!(label, stream.get((i + 1) * 16).map(|id| vec![*id]));
            }
        }

        #[test]
        fn best_fit_cuts_nothing_that_fits_and_loses_nothing(
            lengths in prop::collection::vec((0i64..2, 1i64..60), 0..40), bos: bool, eos: bool,
        ) {
            let layout = layout(Mode::BestFit, bos, eos);
            let input = fragments(&lengths, layout);
            let (sequences, rest) = planned(&input, layout);
            prop_assert!(rest.is_empty());
            let mut out: Vec<_> = sequences.iter().flat_map(|s| &s.fragments).flat_map(ids).collect();
            let mut stream: Vec<_> = input.iter().flat_map(ids).collect();
            // EOS sorts last in its document, although its position is -2
            out.sort_by_key(|(doc, at)| (*doc, if *at == -2 { i64::MAX } else { *at }));
            stream.sort_by_key(|(doc, at)| (*doc, if *at == -2 { i64::MAX } else { *at }));
            prop_assert_eq!(out, stream);
            for sequence in &sequences {
                let filled: usize = sequence.fragments.iter().map(Fragment::ids).sum();
                prop_assert!(filled <= 16);
                // only a fragment longer than a sequence is cut, and the label of a full piece is the next id
                // of the same document
                for fragment in &sequence.fragments {
                    let whole = &input[fragment.doc_id[0] as usize];
                    prop_assert!(fragment == whole || whole.ids() > 16);
                }
                if let Some(label) = &sequence.label {
                    prop_assert_eq!(filled, 16);
                    prop_assert_eq!(label.ids(), 1);
                    prop_assert_eq!(label.doc_id, sequence.fragments[0].doc_id);
                }
            }
        }
    }
}
