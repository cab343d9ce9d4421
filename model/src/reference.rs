//! The same model as one graph in f64, with attention written as softmax over what is seen: what tests compare with. It has
//! nothing of burn's, and a test of its own: its gradients are the loss's differences.

use std::cell::RefCell;
use std::rc::Rc;

use crate::config::Config;
use crate::dataset::NO_TARGET;
use crate::rope::frequencies;
use crate::shards::Unit;

/// A model and a sequence.
#[derive(Clone, Debug)]
pub struct Case {
    pub config: Config,
    /// Each unit's numbers.
    pub units: Vec<Vec<f32>>,
    pub ids: Vec<i32>,
    pub targets: Vec<i32>,
    /// Where documents begin, if attention stays within them.
    pub starts: Option<Vec<usize>>,
}

/// The summed loss, and its gradients by parameter, in the order of [`Config::parameters`].
pub struct Reference {
    pub loss: f64,
    pub gradients: Vec<(String, Vec<f64>)>,
}

impl Case {
    /// Fresh weights, larger so that attention has something to say; ids, targets and documents from `salt`.
    pub fn new(config: Config, length: usize, masked: bool, salt: u64) -> Self {
        let units = Unit::all(&config);
        let numbers = |i: usize| {
            let fresh = crate::checkpoint::initial_weights(&units, i, 0..units[i].length, salt);
            let norms = units[i].norms;
            let wiggled = |(j, w): (usize, f32)| {
                if j < norms { 1.0 + 0.3 * ((j * 7 + i) as f32).sin() } else { w * 6.0 }
            };
            fresh.into_iter().enumerate().map(wiggled).collect()
        };
        let vocab = config.vocab_size as u64;
        let draw = |i: u64| (i * i * 31 + i * 7 + salt * 13 + i / 3) % vocab;
        let targets = (0..length as u64)
            .map(|i| if (i + salt).is_multiple_of(5) { NO_TARGET } else { draw(i + 1) as i32 })
            .collect();
        let starts = masked.then(|| {
            let (mut starts, mut at) = (vec![], 0);
            for i in 0.. {
                if at >= length {
                    break;
                }
                starts.push(at);
                at += 1 + (draw(i + 3) as usize * (1 + i as usize % 4)) % (length / 2 + 1);
            }
            starts
        });
        Self {
            units: (0..units.len()).map(numbers).collect(),
            ids: (0..length as u64).map(|i| draw(i) as i32).collect(),
            targets,
            starts,
            config,
        }
    }

    fn document(&self, position: usize) -> usize {
        let starts = self.starts.as_deref().unwrap_or(&[0]);
        starts[starts.partition_point(|start| *start <= position) - 1]
    }

    pub fn whole_graph(&self) -> Reference {
        let (tape, config) = (Tape::default(), &self.config);
        let mut named: Vec<(String, Matrix)> = vec![];
        for (unit, numbers) in Unit::all(config).iter().zip(&self.units) {
            let mut from = 0;
            for (name, [rows, columns]) in &unit.parameters {
                let stop = from + rows * columns;
                let values = numbers[from..stop].iter().map(|n| f64::from(*n)).collect();
                named.push((name.clone(), tape.add([*rows, *columns], values, |_| vec![])));
                from = stop;
            }
        }
        let get = |name: &str| &named.iter().find(|(n, _)| n == name).expect("a parameter").1;

        let s = self.ids.len();
        let places: Vec<usize> = (0..s).map(|i| i - self.document(i)).collect();
        let longest = places.iter().max().expect("a position") + 1;
        let (frequencies, factor) =
            frequencies(config, if self.starts.is_some() { longest } else { s }).unwrap();
        let table = |f: fn(f64) -> f64| -> Vec<f64> {
            let angles = places.iter().flat_map(|p| frequencies.iter().map(|f| f64::from(*p as f32 * f)));
            // what the model has of them is f32
            angles.map(|a| f64::from((f(a) * factor) as f32)).collect()
        };
        let (cos, sin) = (Rc::new(table(f64::cos)), Rc::new(table(f64::sin)));
        let seen: Vec<bool> = (0..s * s)
            .map(|i| {
                let (query, key) = (i / s, i % s);
                key <= query && self.document(key) == self.document(query)
            })
            .collect();

        let (heads, kv, hd) = (config.num_attention_heads, config.kv_heads(), config.head_dim());
        let mut x = tape.select(get("model.embed_tokens.weight"), &self.ids);
        for i in 0..config.num_hidden_layers {
            let layer = |name: &str| get(&format!("model.layers.{i}.{name}.weight"));
            let y = tape.norm(&x, layer("input_layernorm"), config.rms_norm_eps);
            let [q, k, v] =
                ["q", "k", "v"].map(|name| tape.linear(&y, layer(&format!("self_attn.{name}_proj"))));
            let attended = (0..heads).map(|head| {
                let own = head / (heads / kv);
                let q = tape.turn(&tape.columns(&q, head * hd, hd), &cos, &sin);
                let k = tape.turn(&tape.columns(&k, own * hd, hd), &cos, &sin);
                let scores = tape.linear(&q, &k);
                let shares = tape.softmax(&scores, 1.0 / (hd as f64).sqrt(), &seen);
                tape.product(&shares, &tape.columns(&v, own * hd, hd))
            });
            let attended = tape.beside(&attended.collect::<Vec<_>>());
            let h = tape.sum(&x, &tape.linear(&attended, layer("self_attn.o_proj")));
            let y = tape.norm(&h, layer("post_attention_layernorm"), config.rms_norm_eps);
            let (gate, up) = (tape.linear(&y, layer("mlp.gate_proj")), tape.linear(&y, layer("mlp.up_proj")));
            x = tape.sum(&h, &tape.linear(&tape.gated(&gate, &up), layer("mlp.down_proj")));
        }
        let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let y = tape.norm(&x, get("model.norm.weight"), config.rms_norm_eps);
        let loss = tape.loss(&tape.linear(&y, get(head)), &self.targets);
        let mut gradients = tape.back(&loss);
        let mut of = |matrix: &Matrix| std::mem::take(&mut gradients[matrix.at]);
        Reference { loss: loss.values[0], gradients: named.iter().map(|(n, m)| (n.clone(), of(m))).collect() }
    }
}

/// A matrix of a graph.
#[derive(Clone)]
struct Matrix {
    /// Its place on the tape.
    at: usize,
    shape: [usize; 2],
    values: Rc<Vec<f64>>,
}

impl Matrix {
    fn get(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.shape[1] + column]
    }
}

/// What a matrix's gradient is for those that it was made of, by their places.
type Back = Box<dyn Fn(&[f64]) -> Vec<(usize, Vec<f64>)>>;

/// The matrices of a graph, each after those that it was made of.
#[derive(Default)]
struct Tape(RefCell<Vec<([usize; 2], Back)>>);

/// A matrix `[n, m]` of sums over k.
fn sums([n, k, m]: [usize; 3], term: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
    (0..n * m).map(|at| (0..k).map(|k| term(at / m, k, at % m)).sum()).collect()
}

impl Tape {
    fn add(
        &self,
        shape: [usize; 2],
        values: Vec<f64>,
        back: impl Fn(&[f64]) -> Vec<(usize, Vec<f64>)> + 'static,
    ) -> Matrix {
        assert_eq!(values.len(), shape[0] * shape[1]);
        let mut all = self.0.borrow_mut();
        all.push((shape, Box::new(back)));
        Matrix { at: all.len() - 1, shape, values: Rc::new(values) }
    }

    /// The gradients of one number, by matrix.
    fn back(&self, of: &Matrix) -> Vec<Vec<f64>> {
        let all = self.0.borrow();
        let mut gradients: Vec<Vec<f64>> = all.iter().map(|([n, m], _)| vec![0.0; n * m]).collect();
        gradients[of.at] = vec![1.0];
        for (at, (_, back)) in all.iter().enumerate().rev() {
            for (to, gradient) in back(&gradients[at]) {
                gradients[to].iter_mut().zip(gradient).for_each(|(sum, more)| *sum += more);
            }
        }
        gradients
    }

    /// x · y
    fn product(&self, x: &Matrix, y: &Matrix) -> Matrix {
        let ([n, k], m) = (x.shape, y.shape[1]);
        let values = sums([n, k, m], |i, k, j| x.get(i, k) * y.get(k, j));
        let (x, y) = (x.clone(), y.clone());
        self.add([n, m], values, move |g| {
            let dx = sums([n, m, k], |i, j, k| g[i * m + j] * y.get(k, j));
            let dy = sums([k, n, m], |k, i, j| x.get(i, k) * g[i * m + j]);
            vec![(x.at, dx), (y.at, dy)]
        })
    }

    /// x · wᵀ
    fn linear(&self, x: &Matrix, w: &Matrix) -> Matrix {
        let ([n, k], m) = (x.shape, w.shape[0]);
        let values = sums([n, k, m], |i, k, j| x.get(i, k) * w.get(j, k));
        let (x, w) = (x.clone(), w.clone());
        self.add([n, m], values, move |g| {
            let dx = sums([n, m, k], |i, j, k| g[i * m + j] * w.get(j, k));
            let dw = sums([m, n, k], |j, i, k| g[i * m + j] * x.get(i, k));
            vec![(x.at, dx), (w.at, dw)]
        })
    }

    fn sum(&self, x: &Matrix, y: &Matrix) -> Matrix {
        let values = x.values.iter().zip(&*y.values).map(|(x, y)| x + y).collect();
        let places = [x.at, y.at];
        self.add(x.shape, values, move |g| places.map(|at| (at, g.to_vec())).into())
    }

    /// silu(x) · y, number by number.
    fn gated(&self, x: &Matrix, y: &Matrix) -> Matrix {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let values = x.values.iter().zip(&*y.values).map(|(x, y)| x * sigmoid(*x) * y).collect();
        let (x, y) = (x.clone(), y.clone());
        self.add(x.shape, values, move |g| {
            let all = || g.iter().zip(&*x.values).zip(&*y.values);
            let slope = |x: f64| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)));
            let dx = all().map(|((g, x), y)| g * y * slope(*x)).collect();
            let dy = all().map(|((g, x), _)| g * x * sigmoid(*x)).collect();
            vec![(x.at, dx), (y.at, dy)]
        })
    }

    fn norm(&self, x: &Matrix, w: &Matrix, eps: f64) -> Matrix {
        let [n, m] = x.shape;
        let (x, w) = (x.clone(), w.clone());
        let scale = |row: &[f64]| (row.iter().map(|x| x * x).sum::<f64>() / m as f64 + eps).sqrt().recip();
        let scales: Vec<f64> = x.values.chunks(m).map(scale).collect();
        let values = (0..n * m).map(|at| x.values[at] * scales[at / m] * w.values[at % m]).collect();
        self.add([n, m], values, move |g| {
            let dw = sums([1, n, m], |_, i, j| g[i * m + j] * x.get(i, j) * scales[i]);
            let inner = sums([n, m, 1], |i, j, _| g[i * m + j] * w.values[j] * x.get(i, j));
            let dx = (0..n * m).map(|at| {
                let r = scales[at / m];
                g[at] * w.values[at % m] * r - x.values[at] * r * r * r * inner[at / m] / m as f64
            });
            vec![(x.at, dx.collect()), (w.at, dw)]
        })
    }

    /// Rotates pairs of a row's two halves by the row's angles.
    fn turn(&self, x: &Matrix, cos: &Rc<Vec<f64>>, sin: &Rc<Vec<f64>>) -> Matrix {
        let (shape, at, half) = (x.shape, x.at, x.shape[1] / 2);
        let turned = move |x: &[f64], cos: &[f64], sin: &[f64], sign: f64| {
            let number = |i: usize| {
                let (row, column) = (i / (2 * half), i % (2 * half));
                let angle = row * half + column % half;
                match column < half {
                    true => x[i] * cos[angle] - sign * x[i + half] * sin[angle],
                    false => x[i] * cos[angle] + sign * x[i - half] * sin[angle],
                }
            };
            (0..x.len()).map(number).collect::<Vec<f64>>()
        };
        let (cos, sin) = (cos.clone(), sin.clone());
        let values = turned(&x.values, &cos, &sin, 1.0);
        self.add(shape, values, move |g| vec![(at, turned(g, &cos, &sin, -1.0))])
    }

    /// Softmax of each row times a number, over what is seen of it.
    fn softmax(&self, x: &Matrix, times: f64, seen: &[bool]) -> Matrix {
        let ([_, m], at) = (x.shape, x.at);
        let rows = x.values.chunks(m).zip(seen.chunks(m)).flat_map(|(row, seen)| {
            let exp = |(x, seen): (&f64, &bool)| if *seen { (x * times).exp() } else { 0.0 };
            let row: Vec<f64> = row.iter().zip(seen).map(exp).collect();
            let sum: f64 = row.iter().sum();
            row.into_iter().map(move |x| x / sum)
        });
        let shares: Rc<Vec<f64>> = Rc::new(rows.collect());
        self.add(x.shape, shares.to_vec(), move |g| {
            let rows = g.chunks(m).zip(shares.chunks(m)).flat_map(|(g, shares)| {
                let mean: f64 = g.iter().zip(shares).map(|(g, share)| g * share).sum();
                g.iter().zip(shares).map(move |(g, share)| times * share * (g - mean))
            });
            vec![(at, rows.collect())]
        })
    }

    fn select(&self, x: &Matrix, rows: &[i32]) -> Matrix {
        let ([n, m], at, rows) = (x.shape, x.at, rows.to_vec());
        let values = rows.iter().flat_map(|row| (0..m).map(|j| x.get(*row as usize, j))).collect();
        self.add([rows.len(), m], values, move |g| {
            let mut dx = vec![0.0; n * m];
            for (row, g) in rows.iter().zip(g.chunks(m)) {
                (0..m).for_each(|j| dx[*row as usize * m + j] += g[j]);
            }
            vec![(at, dx)]
        })
    }

    fn columns(&self, x: &Matrix, from: usize, count: usize) -> Matrix {
        let ([n, m], at) = (x.shape, x.at);
        let values = x.values.chunks(m).flat_map(|row| row[from..from + count].to_vec()).collect();
        self.add([n, count], values, move |g| {
            let mut dx = vec![0.0; n * m];
            for (row, g) in dx.chunks_mut(m).zip(g.chunks(count)) {
                row[from..from + count].copy_from_slice(g);
            }
            vec![(at, dx)]
        })
    }

    /// Matrices of one shape beside each other.
    fn beside(&self, all: &[Matrix]) -> Matrix {
        let ([n, m], wide) = (all[0].shape, all.len() * all[0].shape[1]);
        let values = (0..n * wide).map(|at| all[at % wide / m].get(at / wide, at % m)).collect();
        let places: Vec<usize> = all.iter().map(|x| x.at).collect();
        self.add([n, wide], values, move |g| {
            let own = |i: usize| g.chunks(wide).flat_map(|row| row[i * m..(i + 1) * m].to_vec()).collect();
            places.iter().enumerate().map(|(i, at)| (*at, own(i))).collect()
        })
    }

    /// The sum of −log softmax at the rows' targets.
    fn loss(&self, logits: &Matrix, targets: &[i32]) -> Matrix {
        let ([_, m], at, targets) = (logits.shape, logits.at, targets.to_vec());
        let (mut loss, mut slopes) = (0.0, vec![]);
        for (row, target) in logits.values.chunks(m).zip(targets) {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            let counts = if target == NO_TARGET { 0.0 } else { 1.0 };
            let target = target.max(0) as usize;
            loss += counts * (sum.ln() - row[target]);
            let slope = |(j, x): (usize, &f64)| x.exp() / sum - if j == target { 1.0 } else { 0.0 };
            slopes.extend(row.iter().enumerate().map(|x| counts * slope(x)));
        }
        self.add([1, 1], vec![loss], move |g| vec![(at, slopes.iter().map(|slope| slope * g[0]).collect())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn gradients_are_the_differences_of_the_loss() {
        for (tied, masked) in [(false, true), (true, false)] {
            let config = json!({
                "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 11, "rms_norm_eps": 1e-5,
                "tie_word_embeddings": tied,
            });
            let mut case = Case::new(serde_json::from_value(config).unwrap(), 13, masked, 3);
            let gradients = case.whole_graph().gradients;
            let slopes: Vec<f64> = gradients.iter().flat_map(|(_, gradient)| gradient.clone()).collect();
            let mut at = 0;
            for (i, unit) in Unit::all(&case.config).iter().enumerate() {
                let numbers = unit.parameters.iter().map(|(_, [n, m])| n * m).sum::<usize>();
                for j in 0..numbers {
                    let number = case.units[i][j];
                    let mut loss = |number: f32| {
                        case.units[i][j] = number;
                        case.whole_graph().loss
                    };
                    let (low, high) = (number - 1e-3, number + 1e-3);
                    let difference = (loss(high) - loss(low)) / (f64::from(high) - f64::from(low));
                    case.units[i][j] = number;
                    assert!(
                        (difference - slopes[at]).abs() < 1e-4 * (1.0 + slopes[at].abs()),
                        "{j} of unit {i}: {difference} {}",
                        slopes[at]
                    );
                    at += 1;
                }
            }
            assert_eq!(at, slopes.len());
        }
    }
}
