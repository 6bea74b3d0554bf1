"use strict";
// Runs a program that flowmaps.deployment.program wrote: values are float32 arrays, nodes write one each.

// Decode base64 text to bytes.
function bytesOf(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

// Decode float16 numbers to float32.
function floats(half) {
  const out = new Float32Array(half.length);
  for (let i = 0; i < out.length; i++) {
    const h = half[i], sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, m = h & 1023;
    out[i] = sign * (e ? 2 ** (e - 15) * (1 + m / 1024) : 2 ** -24 * m);
  }
  return out;
}

const UNARY = {
  abs: Math.abs, cos: Math.cos, exp: Math.exp, log: Math.log, neg: (x) => -x, reciprocal: (x) => 1 / x, relu: (x) => Math.max(x, 0),
  rsqrt: (x) => 1 / Math.sqrt(x), sigmoid: (x) => 1 / (1 + Math.exp(-x)), sin: Math.sin, sqrt: Math.sqrt,
  tanh: Math.tanh, logical_not: (x) => (x ? 0 : 1),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
};
const BINARY = {
  maximum: Math.max, minimum: Math.min, pow: Math.pow,
  eq: (x, y) => (x === y ? 1 : 0), ne: (x, y) => (x !== y ? 1 : 0), lt: (x, y) => (x < y ? 1 : 0),
  le: (x, y) => (x <= y ? 1 : 0), gt: (x, y) => (x > y ? 1 : 0), ge: (x, y) => (x >= y ? 1 : 0),
  logical_and: (x, y) => (x && y ? 1 : 0), logical_or: (x, y) => (x || y ? 1 : 0),
};

// Pack columns 4 by 4: entry (k, n) of a K x N matrix at b[from] goes to p[(n / 4) K 4 + k 4 + n % 4].
function pack(p, b, from, K, N) {
  for (let n = 0, q = 0; n < N; n += 4) {
    for (let k = 0; k < K; k++) {
      for (let j = 0; j < 4; j++) p[q++] = n + j < N ? b[from + k * N + n + j] : 0;
    }
  }
}

// out[M, N] = a[M, K] p[K, N] + bias[M], with p packed; 2 rows and 4 columns at a time.
function multiply(out, to, a, from, p, M, K, N, bias) {
  for (let n = 0; n < N; n += 4) {
    for (let m = 0; m < M; m += 2) {
      let r = from + m * K, second = m + 1 < M, s = second ? r + K : r, q = n * K;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (const end = r + K; r < end; r++, s++, q += 4) {
        const x = a[r], y = a[s], p0 = p[q], p1 = p[q + 1], p2 = p[q + 2], p3 = p[q + 3];
        a0 += x * p0; a1 += x * p1; a2 += x * p2; a3 += x * p3;
        b0 += y * p0; b1 += y * p1; b2 += y * p2; b3 += y * p3;
      }
      const c = bias ? bias[m] : 0, d = bias && second ? bias[m + 1] : 0, o = to + m * N + n, i = o + N;
      out[o] = a0 + c;
      if (n + 1 < N) out[o + 1] = a1 + c;
      if (n + 2 < N) out[o + 2] = a2 + c;
      if (n + 3 < N) out[o + 3] = a3 + c;
      if (second) {
        out[i] = b0 + d;
        if (n + 1 < N) out[i + 1] = b1 + d;
        if (n + 2 < N) out[i + 2] = b2 + d;
        if (n + 3 < N) out[i + 3] = b3 + d;
      }
    }
  }
}

// Make a function from {name: numbers} of the inputs to the numbers of the output.
function load(program, bytes) {
  const { sizes, nodes } = program, value = new Array(sizes.length).fill(null);
  let at = 0;
  for (const [id, half] of program.constants) {
    const n = sizes[id], buffer = bytes.slice(at, at + n * (half ? 2 : 4)).buffer;
    at += buffer.byteLength;
    value[id] = half ? floats(new Uint16Array(buffer)) : new Float32Array(buffer);
  }
  const constant = value.map((v) => v !== null), last = new Array(sizes.length).fill(-1);
  nodes.forEach((node, i) => node.inputs.forEach((id) => { if (typeof id === "number") last[id] = i; }));
  last[program.output] = nodes.length;
  for (const name in program.inputs) {
    value[program.inputs[name]] = new Float32Array(sizes[program.inputs[name]]);
    last[program.inputs[name]] = nodes.length;
  }

  const maps = new Map(), scratch = {};
  // Positions of the entries of an array of `shape` with `strides`, from `offset`; equal ones are shared.
  function positions(shape, strides, offset) {
    const key = JSON.stringify([shape, strides, offset]);
    if (!maps.has(key)) {
      const n = shape.reduce((a, b) => a * b, 1), map = new Int32Array(n), count = shape.map(() => 0);
      for (let i = 0, p = offset; i < n; i++) {
        map[i] = p;
        for (let d = shape.length - 1; d >= 0; d--) {
          p += strides[d];
          if (++count[d] < shape[d]) break;
          p -= strides[d] * shape[d];
          count[d] = 0;
        }
      }
      maps.set(key, map);
    }
    return maps.get(key);
  }
  function space(name, n) {
    if (!scratch[name] || scratch[name].length < n) scratch[name] = new Float32Array(n);
    return () => scratch[name];
  }

  const make = {
    copy({ parts, inputs, fill }, out) {
      const plan = parts.map((part, i) => [
        value[inputs[i]], positions(part.shape, part.from, part.at), positions(part.shape, part.to, part.start),
      ]);
      return () => {
        if (fill) out.fill(0);
        for (const [x, from, to] of plan) for (let i = 0; i < from.length; i++) out[to[i]] = x[from[i]];
      };
    },
    map({ name, inputs, shape, strides, numbers }, out) {
      const n = out.length, given = inputs.map((id) => value[id]);
      const at = strides.map((s) => positions(shape, s, 0));
      const [a, b, c] = given, [i, j, l] = at;
      if (name === "add") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] + b[j[k]]; };
      if (name === "sub") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] - b[j[k]]; };
      if (name === "mul") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] * b[j[k]]; };
      if (name === "div") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] / b[j[k]]; };
      if (name === "silu") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] / (1 + Math.exp(-a[i[k]])); };
      if (name === "where") return () => { for (let k = 0; k < n; k++) out[k] = a[i[k]] ? b[j[k]] : c[l[k]]; };
      if (name === "clamp") {
        const [low, high] = numbers;
        return () => { for (let k = 0; k < n; k++) out[k] = Math.min(Math.max(a[i[k]], low), high); };
      }
      const f = UNARY[name], g = BINARY[name];
      if (f) return () => { for (let k = 0; k < n; k++) out[k] = f(a[i[k]]); };
      return () => { for (let k = 0; k < n; k++) out[k] = g(a[i[k]], b[j[k]]); };
    },
    multiply({ inputs, sizes: [batch, M, K, N], spread }, out) {
      const [a, b] = inputs.map((id) => value[id]), size = Math.ceil(N / 4) * 4 * K;
      const fixed = constant[inputs[1]] && (batch === 1 || spread) ? new Float32Array(size) : null;
      if (fixed) pack(fixed, b, 0, K, N);
      const panels = fixed ? () => fixed : space("panels", size);
      return () => {
        const p = panels();
        for (let i = 0; i < batch; i++) {
          if (!fixed) pack(p, b, spread ? 0 : i * K * N, K, N);
          multiply(out, i * M * N, a, i * M * K, p, M, K, N, null);
        }
      };
    },
    conv({ inputs, sizes: [C, H, W, O, kh, kw, stride, pad, h, w] }, out) {
      const [x, weight, bias] = inputs.map((id) => value[id]), K = C * kh * kw, N = h * w;
      const PH = H + 2 * pad, PW = W + 2 * pad, padded = space("padded", C * PH * PW);
      const panels = space("panels", Math.ceil(N / 4) * 4 * K), taps = positions([C, kh, kw], [PH * PW, PW, 1], 0);
      const starts = positions([h, w], [PW * stride, stride], 0);
      return () => {
        const p = panels(), y = padded();
        y.fill(0, 0, C * PH * PW);
        for (let c = 0; c < C; c++) {
          for (let r = 0; r < H; r++) {
            const from = (c * H + r) * W, to = (c * PH + r + pad) * PW + pad;
            for (let j = 0; j < W; j++) y[to + j] = x[from + j];
          }
        }
        for (let n = 0, q = 0; n < N; n += 4) {
          const s0 = starts[n], s1 = starts[Math.min(n + 1, N - 1)], s2 = starts[Math.min(n + 2, N - 1)];
          const s3 = starts[Math.min(n + 3, N - 1)];
          for (let k = 0; k < K; k++) {
            const t = taps[k];
            p[q++] = y[s0 + t]; p[q++] = y[s1 + t]; p[q++] = y[s2 + t]; p[q++] = y[s3 + t];
          }
        }
        multiply(out, 0, weight, 0, p, O, K, N, bias);
      };
    },
    reduce({ name, inputs, n }, out) {
      const x = value[inputs[0]];
      return () => {
        for (let i = 0; i < out.length; i++) {
          let sum = name === "amax" ? -Infinity : 0;
          if (name === "amax") for (let k = i * n; k < (i + 1) * n; k++) sum = Math.max(sum, x[k]);
          else for (let k = i * n; k < (i + 1) * n; k++) sum += x[k];
          out[i] = name === "mean" ? sum / n : sum;
        }
      };
    },
    softmax({ inputs, n }, out) {
      const x = value[inputs[0]];
      return () => {
        for (let i = 0; i < out.length; i += n) {
          let most = -Infinity, sum = 0;
          for (let k = i; k < i + n; k++) most = Math.max(most, x[k]);
          for (let k = i; k < i + n; k++) sum += out[k] = Math.exp(x[k] - most);
          for (let k = i; k < i + n; k++) out[k] /= sum;
        }
      };
    },
    norm({ inputs, n, eps }, out) {
      const x = value[inputs[0]];
      return () => {
        for (let i = 0; i < out.length; i += n) {
          let mean = 0, square = 0;
          for (let k = i; k < i + n; k++) mean += x[k];
          mean /= n;
          for (let k = i; k < i + n; k++) square += (x[k] - mean) * (x[k] - mean);
          const scale = 1 / Math.sqrt(square / n + eps);
          for (let k = i; k < i + n; k++) out[k] = (x[k] - mean) * scale;
        }
      };
    },
    pool({ inputs, sizes: [C, H, W, kernel, stride, pad, h, w] }, out) {
      const x = value[inputs[0]];
      return () => {
        for (let c = 0, o = 0; c < C; c++) {
          for (let i = 0; i < h; i++) {
            for (let j = 0; j < w; j++) {
              let sum = 0;
              for (let r = Math.max(0, i * stride - pad); r < Math.min(H, i * stride - pad + kernel); r++) {
                const row = (c * H + r) * W;
                for (let q = Math.max(0, j * stride - pad); q < Math.min(W, j * stride - pad + kernel); q++) {
                  sum += x[row + q];
                }
              }
              out[o++] = sum / (kernel * kernel);
            }
          }
        }
      };
    },
  };

  const free = {}, steps = nodes.map((node, i) => {
    const n = sizes[node.out];
    value[node.out] = (free[n] || []).pop() || new Float32Array(n);
    const step = make[node.op](node, value[node.out]);
    for (const id of new Set([...node.inputs, node.out])) {
      if (!constant[id] && last[id] <= i) (free[sizes[id]] ||= []).push(value[id]);
    }
    return step;
  });
  const output = value[program.output];
  return (given) => {
    for (const name in program.inputs) value[program.inputs[name]].set(given[name]);
    for (const step of steps) step();
    return output.slice();
  };
}
