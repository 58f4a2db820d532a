'use strict';
// Everything a run wrote reaches the page as text nodes only. No innerHTML anywhere.
const DATA = JSON.parse(document.getElementById('run-data').textContent);

/** An element with properties (`class`, `on…` handlers, attributes) and children (nodes or text). */
function el(tag, props = {}, ...children) {
  const node = tag === 'svg' || el.svg.has(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') for (const [key, item] of Object.entries(value)) node.style.setProperty(key, item);
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}
el.svg = new Set(['path', 'line', 'circle', 'text', 'g', 'rect']);

/** Control and bidirectional characters made visible: what an agent prints must not rearrange the page. */
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, '\u2421')
    .replace(/[\u0080-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      c => '\u27e8U+' + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9');
}

const known = value => value !== null && value !== undefined;
const number = (value, digits = 3) => !known(value) ? '\u2013'
  : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(1)
  : String(+value.toPrecision(digits));
const percent = value => known(value) ? (100 * value).toFixed(1) + '%' : '\u2013';
const plural = (count, noun) => `${count} ${noun}${count === 1 ? '' : 's'}`;

/** `#theme=dark&trajectory=ID`: what a link can ask for. */
const asked = new URLSearchParams(location.hash.slice(1));

const theme = {
  stored() { try { return localStorage.getItem('rome-theme'); } catch { return null; } },
  set(name) { document.documentElement.dataset.theme = name; },
  toggle() {
    const name = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
    theme.set(name);
    try { localStorage.setItem('rome-theme', name); } catch { /* a page from disk may have no storage */ }
  },
};
const prefersDark = matchMedia('(prefers-color-scheme: dark)');
theme.set(asked.get('theme') || theme.stored() || (prefersDark.matches ? 'dark' : 'light'));
prefersDark.addEventListener('change', event => { if (!theme.stored()) theme.set(event.matches ? 'dark' : 'light'); });
document.getElementById('theme').addEventListener('click', theme.toggle);
