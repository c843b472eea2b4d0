// Beam search for one image, with one beam greedy search, as in tinycap/deploy/token_search.py.
//
// `step(tokens, parents)` is called with the last tokens of the running beams and, after the first step, with the row
// of the previous step that each continues; it returns a row of logits for each beam. `settings` are `{ start, eos,
// limit, suppress, numBeams, lengthPenalty, earlyStopping }`. `report(tokens)` is called after each step with the best
// running tokens. The result is `{ tokens, logProb }`: token ids with the end token, and the sum of their
// log-probabilities.

export async function beamSearch(step, settings, report) {
  const { start, eos, limit, suppress, numBeams, lengthPenalty } = settings;
  const earlyStopping = numBeams === 1 ? true : settings.earlyStopping;
  const numKept = Math.max(2, 1 + eos.length) * numBeams;
  let running = [{ tokens: [], logProb: 0 }];
  let [next, parents] = [[start], null];
  // The best ended captions, each with its length-normalized score.
  let ended = [];
  for (let length = 1; length <= limit; length++) {
    const rows = (await step(next, parents)).map((row) => logSoftmax(row, suppress));
    const best = topCandidates(rows, running, numKept);
    const ends = ({ token }) => eos.includes(token) || length === limit;
    // Candidates after the first `numBeams` only serve to keep enough beams running.
    for (const candidate of best.slice(0, numBeams).filter(ends)) {
      const tokens = [...running[candidate.parent].tokens, candidate.token];
      ended.push({ tokens, logProb: candidate.logProb, score: candidate.logProb / length ** lengthPenalty });
    }
    // Sorting is stable: of equal scores the earlier one stays first.
    ended = ended.sort((a, b) => b.score - a.score).slice(0, numBeams);
    const open = best.filter((candidate) => !ends(candidate)).slice(0, numBeams);
    if (open.length === 0) break;
    parents = open.map(({ parent }) => parent);
    next = open.map(({ token }) => token);
    running = open.map(({ parent, token, logProb }) => ({ tokens: [...running[parent].tokens, token], logProb }));
    if (ended.length === numBeams) {
      const finalLength = earlyStopping === "never" && lengthPenalty > 0 ? limit : length;
      const attainable = running[0].logProb / finalLength ** lengthPenalty;
      if (earlyStopping === true || attainable <= ended[numBeams - 1].score) break;
    }
    report(running[0].tokens);
  }
  return ended[0];
}

/** The `count` best continuations of the running beams, best first, as `{ parent, token, logProb }`. */
function topCandidates(rows, running, count) {
  const best = [];
  rows.forEach((row, parent) => {
    for (let token = 0; token < row.length; token++) {
      const logProb = row[token] + running[parent].logProb;
      if (best.length === count && logProb <= best[count - 1].logProb) continue;
      // Behind equal ones, which have lower positions.
      const place = best.findIndex((candidate) => candidate.logProb < logProb);
      best.splice(place < 0 ? best.length : place, 0, { parent, token, logProb });
      if (best.length > count) best.pop();
    }
  });
  return best;
}

function logSoftmax(logits, suppress) {
  const max = logits.reduce((a, b) => Math.max(a, b));
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - max), 0);
  const logProbs = Float32Array.from(logits, (logit) => logit - max - Math.log(sum));
  for (const token of suppress) logProbs[token] = -Infinity;
  return logProbs;
}
