//! Ring attention (context parallelism): a sequence is split over ranks, and its key/value blocks travel round a ring.
//!
//! ```text
//! chunk      0   1   2   3   4   5   6   7        the sequence has 2 × ranks chunks
//! rank       0   1   2   3   3   2   1   0        each rank has a chunk and its mirror image (zigzag)
//! ```
//!
//! This balances causal attention: with the keys and values of any rank, each rank computes half of all pairs.

use std::ops::Range;

use burn_tensor::Tensor;

use crate::Result;
use crate::attention::{AttentionGradients, Block, Kernel, OnlineSoftmax};
use crate::comm::Comm;
use crate::llama::to_f32;

/// Which rows of a sequence a rank has.
#[derive(Clone, Debug)]
pub struct Sharding {
    rank: usize,
    ranks: usize,
    /// Rows in a chunk. With one rank, the whole sequence is one chunk.
    chunk: usize,
    /// The sequence's length. Rows beyond it are padding. They are last, so no other row attends to them.
    length: usize,
    /// The bounds of documents that attend only to themselves, from 0 to the length; `None` if attention spans the sequence.
    documents: Option<Vec<usize>>,
}

impl Sharding {
    /// `starts` are the ascending starts of documents, if attention stays within them.
    pub fn new(rank: usize, ranks: usize, length: usize, starts: Option<&[usize]>) -> Self {
        let chunk = if ranks == 1 { length } else { length.div_ceil(2 * ranks) };
        let documents = starts.map(|starts| {
            // Padding is a document of its own.
            let mut all: Vec<usize> = [0].into_iter().chain(starts.iter().copied()).chain([length]).collect();
            all.dedup();
            all
        });
        Self { rank, ranks, chunk, length, documents }
    }

    /// The chunks of a rank.
    fn chunks(&self, rank: usize) -> Vec<usize> {
        if self.ranks == 1 { vec![0] } else { vec![rank, 2 * self.ranks - 1 - rank] }
    }

    /// Rows of each rank.
    pub fn rows_per_rank(&self) -> usize {
        self.chunks(0).len() * self.chunk
    }

    /// The indices of this rank's rows in the sequence. Those from `length` on are padding.
    pub fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        self.chunks(self.rank).into_iter().flat_map(|chunk| chunk * self.chunk..(chunk + 1) * self.chunk)
    }

    /// This rank's rows of a sequence-long list, with `padding` beyond its end.
    pub fn local_rows<T: Copy>(&self, whole: &[T], padding: T) -> Vec<T> {
        self.indices().map(|index| whole.get(index).copied().unwrap_or(padding)).collect()
    }

    /// The RoPE position of each of this rank's rows: within its document if attention stays within documents, otherwise
    /// within the sequence.
    pub fn position_ids(&self) -> Vec<usize> {
        self.indices().map(|index| index - self.document(index).start).collect()
    }

    /// The length of the longest document, or of the sequence if attention spans it.
    pub fn longest_document(&self) -> usize {
        match &self.documents {
            None => self.length,
            Some(starts) => starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(self.length),
        }
    }

    /// The document that contains an index of the sequence.
    fn document(&self, index: usize) -> Range<usize> {
        let Some(starts) = &self.documents else { return 0..usize::MAX };
        let after = starts.partition_point(|start| *start <= index);
        starts[after - 1]..starts.get(after).copied().unwrap_or(usize::MAX)
    }

    /// The blocks in which this rank's queries attend to the keys of rank `other`.
    pub fn blocks(&self, other: usize) -> Vec<Block> {
        let c = self.chunk;
        let all = self.rows_per_rank();
        if self.documents.is_none() {
            // Our own two chunks in order are causal. The front chunk of a lower rank precedes both of ours, and its mirror
            // image follows both. Both chunks of a higher rank lie between our two.
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
                // Converts indices within a chunk to rows.
                let rows = |indices: Range<usize>, chunk: usize, nth: usize| {
                    indices.start - chunk * c + nth * c..indices.end - chunk * c + nth * c
                };
                if theirs == mine {
                    let mut index = from;
                    while index < until {
                        let stop = self.document(index).end.min(until);
                        let square = rows(index..stop, mine, i);
                        blocks.push(Block { queries: square.clone(), keys: square, causal: true });
                        index = stop;
                    }
                } else if theirs < mine {
                    // Only a document that continues into our chunk is in both chunks.
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

/// Sends tensors to the next rank of the ring, and receives as many from the previous one. The result waits for them.
fn ring_shift<'a>(
    comm: &'a dyn Comm,
    tensors: [&Tensor<3>; 2],
) -> Result<impl FnOnce() -> Result<[Tensor<3>; 2]> + 'a> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let shapes = tensors.map(burn_tensor::Tensor::dims);
    let flat = tensors.map(|tensor| tensor.clone().reshape([-1])).to_vec();
    let pending = comm.exchange((rank + 1) % ranks, (rank + ranks - 1) % ranks, flat)?;
    Ok(move || {
        let mut received = pending()?.into_iter().zip(shapes).map(|(flat, shape)| flat.reshape(shape));
        let mut next = || received.next().expect("as many tensors as were sent");
        Ok([next(), next()])
    })
}

/// Attention of this rank's queries to the keys and values of all ranks: out `[heads, rows, hd]` in the type of q, and lse
/// `[heads, rows, 1]`.
pub fn forward(
    comm: &dyn Comm,
    kernel: Kernel,
    sharding: &Sharding,
    [q, k, v]: &[Tensor<3>; 3],
) -> Result<(Tensor<3>, Tensor<3>)> {
    let (rank, ranks) = (comm.rank(), comm.size());
    let mut attention = OnlineSoftmax::new(q);
    let (mut k, mut v) = (k.clone(), v.clone());
    for step in 0..ranks {
        // The next keys and values arrive while these are used.
        let coming = if step + 1 < ranks { Some(ring_shift(comm, [&k, &v])?) } else { None };
        for block in sharding.blocks((rank + ranks - step) % ranks) {
            attention.forward(kernel, &block, q, &k, &v);
        }
        if let Some(coming) = coming {
            [k, v] = coming()?;
        }
    }
    let (out, lse) = attention.finish();
    Ok((out.cast(q.dtype()), lse))
}

/// The gradients of this rank's q, k and v in f32, from the gradient of out. The other arguments are those of [`forward`]
/// and its results.
///
/// Keys and values travel round the ring once more, followed by the sums of their gradients. After as many steps as ranks,
/// each sum is back at its own rank.
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
    let zeros = |like: &Tensor<3>| to_f32(like.zeros_like());
    let mut dq = zeros(q);
    let (mut k, mut v) = (k.clone(), v.clone());
    let (mut dk, mut dv) = (zeros(&k), zeros(&v));
    let mut sums_coming = None;
    for step in 0..ranks {
        let coming = if step + 1 < ranks { Some(ring_shift(comm, [&k, &v])?) } else { None };
        // Compute this rank's part while the sums of the previous ranks arrive.
        let mut own = AttentionGradients { dq, dk: zeros(&k), dv: zeros(&v) };
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
            sums_coming = Some(Box::new(ring_shift(comm, [&dk, &dv])?));
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
