// Line and stacked charts as SVG: drawn to the width of their card, again when it changes.
const COLORS = 8;
const PAD = { left: 46, right: 12, top: 8, bottom: 24 };

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= rough * 0.999);
  const out = [];
  const digits = Math.max(0, -Math.floor(Math.log10(step)) + (step / power === 2.5 ? 1 : 0));
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) out.push(+(i * step).toFixed(Math.min(digits, 20)));
  return out;
}

function colorOf(chart, index) {
  const series = chart.series[index];
  if (series.faint) return `var(--c${Math.max(0, index - 1) % COLORS})`;  // the curve before it is its smoothed one
  return `var(--c${index % COLORS})`;
}

/** Heights of a stacked chart: each series on top of those before it. */
function stacked(chart) {
  const steps = [...new Set(chart.series.flatMap(s => s.x))].sort((a, b) => a - b);
  const base = new Map(steps.map(x => [x, 0]));
  return chart.series.map(series => {
    const at = new Map(series.x.map((x, i) => [x, series.y[i]]));
    const low = steps.map(x => base.get(x));
    steps.forEach(x => base.set(x, base.get(x) + (at.get(x) || 0)));
    return { ...series, x: steps, y: steps.map(x => at.get(x) ?? null), low, high: steps.map(x => base.get(x)) };
  });
}

function range(chart, shapes) {
  const values = shapes.flatMap(s => [...(chart.kind === 'stack' ? s.high : s.y), ...(s.low || []), ...(s.high || [])]).filter(known);
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.fraction) { low = Math.min(0, low); if (chart.section !== 'ipa' || chart.wide) high = Math.max(high, 1); }
  if (chart.kind === 'stack') low = 0;
  if (high - low < 1e-9) { const room = Math.abs(high) * 0.1 || 0.5; high += room; if (!chart.fraction) low -= room; }
  else if (!chart.fraction && chart.kind !== 'stack') { const room = (high - low) * 0.06; low -= room; high += room; }
  return [low, high];
}

function linePath(series, px, py) {
  let path = '', pen = false;
  series.x.forEach((x, i) => {
    if (!known(series.y[i])) { pen = false; return; }
    path += `${pen ? 'L' : 'M'}${px(x).toFixed(1)},${py(series.y[i]).toFixed(1)}`;
    pen = true;
  });
  return path;
}

function bandPath(series, px, py) {
  const points = series.x.map((x, i) => [x, series.low[i], series.high[i]]).filter(p => known(p[1]) && known(p[2]));
  if (points.length < 2) return '';
  const top = points.map(p => `${px(p[0]).toFixed(1)},${py(p[2]).toFixed(1)}`);
  const bottom = points.reverse().map(p => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`);
  return `M${top.join('L')}L${bottom.join('L')}Z`;
}

function drawSeries(chart, series, index, px, py) {
  const color = colorOf(chart, index);
  const group = el('g', { 'data-series': index });
  const band = series.low && series.high ? bandPath(series, px, py) : '';
  if (band) group.append(el('path', { d: band, style: { fill: color, opacity: chart.kind === 'stack' ? '.8' : '.16' } }));
  if (chart.kind === 'stack') return group;
  const dash = index >= COLORS && !series.faint ? '5 3' : 'none';
  group.append(el('path', { d: linePath(series, px, py), fill: 'none', 'stroke-linejoin': 'round',
    style: { stroke: color, 'stroke-width': series.faint ? '1' : '1.8', opacity: series.faint ? '.35' : '1', 'stroke-dasharray': dash } }));
  if (series.dots || series.x.length === 1) series.x.forEach((x, i) => {
    if (known(series.y[i])) group.append(el('circle', { cx: px(x), cy: py(series.y[i]), r: 3.2, style: { fill: color } }));
  });
  return group;
}

function draw(card, chart) {
  const holder = card.querySelector('.plot');
  const width = Math.max(220, holder.clientWidth), height = chart.wide ? 280 : 180;
  const shapes = chart.kind === 'stack' ? stacked(chart) : chart.series;
  const xs = shapes.flatMap(s => s.x);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const [y0, y1] = range(chart, shapes);
  const px = x => PAD.left + (x - x0) / (x1 - x0) * (width - PAD.left - PAD.right);
  const py = y => height - PAD.bottom - (y - y0) / (y1 - y0) * (height - PAD.top - PAD.bottom);
  const svg = el('svg', { viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': chart.title });
  for (const y of ticks(y0, y1, chart.wide ? 5 : 4)) {
    svg.append(el('line', { class: 'rule', x1: PAD.left, x2: width - PAD.right, y1: py(y), y2: py(y) }));
    svg.append(el('text', { x: PAD.left - 7, y: py(y) + 4, 'text-anchor': 'end' }, chart.fraction ? `${+(100 * y).toFixed(1)}%` : number(y, 6)));
  }
  for (const x of ticks(x0, x1, width / 110).filter(Number.isInteger)) {
    svg.append(el('text', { x: px(x), y: height - 6, 'text-anchor': 'middle' }, String(x)));
  }
  for (let i = shapes.length - 1; i >= 0; i--) svg.append(drawSeries(chart, shapes[i], i, px, py));
  const cursor = el('line', { class: 'rule', y1: PAD.top, y2: height - PAD.bottom, style: { stroke: 'var(--soft)', visibility: 'hidden' } });
  svg.append(cursor);
  holder.replaceChildren(svg);
  const steps = [...new Set(xs)].sort((a, b) => a - b);
  svg.addEventListener('pointermove', event => {
    const at = x0 + (event.clientX - svg.getBoundingClientRect().left - PAD.left) / (width - PAD.left - PAD.right) * (x1 - x0);
    const step = steps.reduce((best, x) => Math.abs(x - at) < Math.abs(best - at) ? x : best);
    cursor.setAttribute('x1', px(step)); cursor.setAttribute('x2', px(step));
    cursor.style.visibility = 'visible';
    showTip(card, chart, shapes, step, px(step), width);
  });
  svg.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; card.querySelector('.tip')?.remove(); });
}

function showTip(card, chart, shapes, step, x, width) {
  card.querySelector('.tip')?.remove();
  const form = chart.fraction ? percent : value => number(value, 4);
  const rows = shapes.flatMap((series, i) => {
    const k = series.x.lastIndexOf(step);
    if (k < 0 || !known(series.y[k])) return [];
    const interval = chart.kind !== 'stack' && series.low ? ` (${form(series.low[k])} \u2013 ${form(series.high[k])})` : '';
    return [el('div', {}, el('i', { style: { background: colorOf(chart, i) } }), `${series.label}: ${form(series.y[k])}${interval}`)];
  });
  const tip = el('div', { class: 'tip' }, el('b', {}, `step ${step}`), rows);
  card.append(tip);
  const left = x + 14 + tip.offsetWidth > width ? x - tip.offsetWidth - 4 : x + 24;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = '4.2rem';
}

function legend(card, chart) {
  return el('div', { class: 'legend' }, chart.series.map((series, i) => el('span', {
    onpointerenter: () => card.querySelectorAll('g[data-series]').forEach(g => { g.style.opacity = g.dataset.series === String(i) ? 1 : 0.15; }),
    onpointerleave: () => card.querySelectorAll('g[data-series]').forEach(g => { g.style.opacity = ''; }),
  }, el('i', { style: { background: colorOf(chart, i), opacity: series.faint ? '.4' : '1' } }), series.label)));
}

function chartCard(chart) {
  const card = el('section', { class: `card chart${chart.wide ? ' wide' : ''}`, 'data-chart': chart.key });
  card.append(el('h3', {}, chart.title, el('small', {}, chart.note)));
  if (chart.series.length > 1) card.append(legend(card, chart));
  const holder = el('div', { class: 'plot' });
  card.append(holder);
  let drawn = 0;
  const fit = () => { if (holder.clientWidth && holder.clientWidth !== drawn) { drawn = holder.clientWidth; draw(card, chart); } };
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(holder);
  return card;
}

(function showCharts() {
  const place = document.getElementById('charts');
  const sections = [['ipa', 'IPA'], ['eval', 'Evaluations'], ['warm', 'Warm start']];
  for (const [key, title] of sections) {
    const charts = DATA.charts.filter(chart => chart.section === key);
    if (charts.length) place.append(el('h4', {}, title), el('div', { class: 'grid' }, charts.map(chartCard)));
  }
  const rest = DATA.charts.filter(chart => chart.section === 'more');
  if (rest.length) place.append(el('details', { class: 'more' },
    el('summary', {}, `All other metrics (${rest.length})`), el('div', { class: 'grid' }, rest.map(chartCard))));
  if (!DATA.charts.length) place.append(el('p', { class: 'empty' }, 'No metrics yet.'));
})();
