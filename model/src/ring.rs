//! Sharded attention: a sequence split over ranks, whose key/value blocks go round a ring.
//!
//! ```text
//! chunk      0   1   2   3   4   5   6   7        a sequence in 2 × ranks chunks
//! rank       0   1   2   3   3   2   1   0        each rank has one from the front and its mirror image (zigzag)
//! ```
//!
//! so that causal work is the same for all: whichever rank's keys and values a rank holds, it is half of all pairs.

use std::ops::Range;

use burn_tensor::Tensor;

use crate::Result;
use crate::attention::{Block, Gradients, Kernel, Partial};
use crate::comm::Comm;
use crate::llama::wide;

/// Which rows of a sequence a rank has.
#[derive(Clone, Debug)]
pub struct Sharding {
    rank: usize,
    ranks: usize,
    /// Positions in a chunk; for one rank the whole sequence is one.
    chunk: usize,
    /// Of the sequence. What rows there are more are padding: at the end, so that nothing attends to it.
    length: usize,
    /// Where the documents begin that attend only to themselves, 0 first; `None` where all is one.
    documents: Option<Vec<usize>>,
}

impl Sharding {
    /// `starts`: where documents begin, in ascending order, if attention stays within them.
    pub fn new(rank: usize, ranks: usize, length: usize, starts: Option<&[usize]>) -> Self {
        let chunk = if ranks == 1 { length } else { length.div_ceil(2 * ranks) };
        let documents = starts.map(|starts| {
            // padding is a document of its own
            let mut all: Vec<usize> = [0].into_iter().chain(starts.iter().copied()).chain([length]).collect();
            all.dedup();
            all
        });
        Self { rank, ranks, chunk, length, documents }
    }

    /// The chunks of a rank: from the front, and its mirror image.
    fn chunks(&self, rank: usize) -> Vec<usize> {
        if self.ranks == 1 { vec![0] } else { vec![rank, 2 * self.ranks - 1 - rank] }
    }

    /// How many rows each rank has.
    pub fn rows(&self) -> usize {
        self.chunks(0).len() * self.chunk
    }

    /// Where this rank's rows are in the sequence; those from `length` on are padding.
    pub fn places(&self) -> impl Iterator<Item = usize> + '_ {
        self.chunks(self.rank).into_iter().flat_map(|chunk| chunk * self.chunk..(chunk + 1) * self.chunk)
    }

    /// This rank's rows of something that there is for each position, `padding` where there is none.
    pub fn take<T: Copy>(&self, whole: &[T], padding: T) -> Vec<T> {
        self.places().map(|place| whole.get(place).copied().unwrap_or(padding)).collect()
    }

    /// The position of each of this rank's rows: in its document if attention stays within it, else in the sequence.
    pub fn positions(&self) -> Vec<usize> {
        self.places().map(|place| place - self.document(place).start).collect()
    }

    /// One more than the largest position there is in the sequence.
    pub fn longest(&self) -> usize {
        match &self.documents {
            None => self.length,
            Some(starts) => starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(self.length),
        }
    }

    /// The document around a place in the sequence.
    fn document(&self, place: usize) -> Range<usize> {
        let Some(starts) = &self.documents else { return 0..usize::MAX };
        let after = starts.partition_point(|start| *start <= place);
        starts[after - 1]..starts.get(after).copied().unwrap_or(usize::MAX)
    }

    /// What this rank's queries attend to in the keys of `other`, as rows of each.
    pub fn blocks(&self, other: usize) -> Vec<Block> {
        let c = self.chunk;
        let all = self.rows();
        if self.documents.is_none() {
            // both chunks in order are causal; a rank before has its front chunk before both of ours, and its mirror image
            // after; of a rank behind, both chunks are before our second and after our first
            return match other.cmp(&self.rank) {
                std::cmp::Ordering::Equal => vec![Block { queries: 0..all, keys: 0..all, causal: true }],
                std::cmp::Ordering::Less => vec![Block { queries: 0..all, keys: 0..c, causal: false }],
                std::cmp::Ordering::Greater => vec![Block { queries: c..all, keys: 0..all, causal: false }],
            };
        }
        let mut blocks = vec![];
        for (i, mine) in self.chunks(self.rank).into_iter().enumerate() {
            for (j, theirs) in self.chunks(other).into_iter().enumerate() {
                let (from, until) = (mine * c, (mine + 1) * c);
                // places of a chunk as rows
                let rows = |places: Range<usize>, chunk: usize, nth: usize| {
                    places.start - chunk * c + nth * c..places.end - chunk * c + nth * c
                };
                if theirs == mine {
                    let mut place = from;
                    while place < until {
                        let stop = self.document(place).end.min(until);
                        let square = rows(place..stop, mine, i);
                        blocks.push(Block { queries: square.clone(), keys: square, causal: true });
                        place = stop;
                    }
                } else if theirs < mine {
                    // only a document that runs on into our chunk is in both
                    let document = self.document(from);
                    let keys = document.start.max(theirs * c)..(theirs + 1) * c;
                    if !keys.is_empty() {
                        let queries = rows(from..document.end.min(until), mine, i);
                        blocks.push(Block { queries, keys: rows(keys, theirs, j), causal: false });
                    }
                }
            }
        }
        blocks
    }
}

/// Tensors of three dimensions over the ring, one step: to the next rank, from the one before.
fn pass<'a>(
    comm: &'a dyn Comm,
    tensors: [&Tensor<3>; 2],
) -> Result<impl FnOnce() -> Result<[Tensor<3>; 2]> + 'a> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let shapes = tensors.map(|tensor| tensor.dims());
    let flat = tensors.map(|tensor| tensor.clone().reshape([-1])).to_vec();
    let pending = comm.exchange((rank + 1) % ranks, (rank + ranks - 1) % ranks, flat)?;
    Ok(move || {
        let mut came = pending()?.into_iter().zip(shapes).map(|(flat, shape)| flat.reshape(shape));
        let mut next = || came.next().expect("as many tensors as were sent");
        Ok([next(), next()])
    })
}

/// This rank's queries against the keys and values of all ranks: out `[heads, rows, hd]` in the type of q, and lse
/// `[heads, rows, 1]`.
pub fn forward(
    comm: &dyn Comm,
    kernel: Kernel,
    sharding: &Sharding,
    [q, k, v]: &[Tensor<3>; 3],
) -> Result<(Tensor<3>, Tensor<3>)> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let mut partial = Partial::new(q);
    let (mut k, mut v) = (k.clone(), v.clone());
    for step in 0..ranks {
        // the next keys and values come in while these are computed with
        let coming = if step + 1 < ranks { Some(pass(comm, [&k, &v])?) } else { None };
        for block in sharding.blocks((rank + ranks - step) % ranks) {
            partial.forward(kernel, &block, q, &k, &v);
        }
        if let Some(coming) = coming {
            [k, v] = coming()?;
        }
    }
    let (out, lse) = partial.finish();
    Ok((out.cast(q.dtype()), lse))
}

/// Gradients of this rank's q, k and v, in f32, from that of out, and what [`forward`] took and gave.
///
/// Keys and values go round once more, and with them the sums of their gradients, which are home after as many steps as
/// there are ranks.
pub fn backward(
    comm: &dyn Comm,
    kernel: Kernel,
    sharding: &Sharding,
    dout: &Tensor<3>,
    [q, k, v]: &[Tensor<3>; 3],
    out: &Tensor<3>,
    lse: &Tensor<3>,
) -> Result<[Tensor<3>; 3]> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let zeros = |like: &Tensor<3>| wide(like.zeros_like());
    let mut dq = zeros(q);
    let (mut k, mut v) = (k.clone(), v.clone());
    let (mut dk, mut dv) = (zeros(&k), zeros(&v));
    let mut sums_coming = None;
    for step in 0..ranks {
        let coming = if step + 1 < ranks { Some(pass(comm, [&k, &v])?) } else { None };
        // this step's own part, while the sums of the ranks before come in
        let mut own = Gradients { dq, dk: zeros(&k), dv: zeros(&v) };
        for block in sharding.blocks((rank + ranks - step) % ranks) {
            own = own.backward(kernel, &block, dout, [q, &k, &v], out, lse);
        }
        dq = own.dq;
        if let Some(coming) = sums_coming.take() {
            let coming: Box<dyn FnOnce() -> Result<[Tensor<3>; 2]>> = coming;
            [dk, dv] = coming()?;
        }
        (dk, dv) = (dk + own.dk, dv + own.dv);
        if ranks > 1 {
            sums_coming = Some(Box::new(pass(comm, [&dk, &dv])?));
        }
        if let Some(coming) = coming {
            [k, v] = coming()?;
        }
    }
    if let Some(coming) = sums_coming {
        [dk, dv] = coming()?;
    }
    Ok([dq, dk, dv])
}
