// The trajectory viewer: choose a step, filter, read one episode as a sequence of cards.
const FOLD_LINES = 12;

/** Background for a return: green above zero, red below, stronger with size. `largest` maps to full strength. */
function tint(value, largest, strength = 0.3) {
  if (!known(value) || !value || !largest) return 'transparent';
  return `rgba(var(--${value > 0 ? 'good' : 'bad'}-rgb), ${(Math.min(1, Math.abs(value) / largest) * strength).toFixed(3)})`;
}
const edge = (value, largest) => known(value) && value ? tint(value, largest, 1) : 'var(--line)';

function badge(kind, ...content) { return el('span', { class: `badge ${kind}` }, content); }

function chunkBadges(chunk, index, trajectory) {
  const out = [];
  if (index < trajectory.prefix) out.push(badge('warn', 'expert prefix'));
  if (chunk.error) out.push(badge('warn', 'command failed'));
  if (known(trajectory.positive)) out.push(trajectory.positive ? badge('good', 'positive') : badge('bad', 'negative'));
  if (known(chunk.kept)) out.push(chunk.kept ? badge('', 'kept') : badge('bad', 'masked'));
  if (known(chunk.ratio)) out.push(badge('', 'ρ ', el('b', {}, number(chunk.ratio))));
  if (known(chunk.mismatch)) out.push(badge('', 'π_old/μ ', el('b', {}, number(chunk.mismatch))));
  if (known(chunk.intrinsic)) out.push(badge('', 'r ', el('b', {}, number(chunk.intrinsic))));
  const versions = chunk.versions;
  if (versions.length) out.push(badge(versions.length > 1 ? 'warn' : '', versions.length > 1 ? `v${versions[0]}–${versions.at(-1)}` : `v${versions[0]}`));
  out.push(badge('', plural(chunk.ids.length, 'token')));
  return el('div', { class: 'badges' }, out);
}

/** The chunk's text: what stands between <tool_call> tags is the command. */
function plainText(text) {
  const parts = visible(text).split(/(<\/?tool_call>|<\|[a-z_]+\|>)/);
  let inside = false;
  return parts.filter(part => part).map(part => {
    if (/^<.*>$/.test(part) && (part.includes('tool_call') || part.startsWith('<|'))) {
      inside = part === '<tool_call>';
      return el('span', { class: 'markup' }, part);
    }
    return el('span', { class: inside ? 'call' : '' }, part);
  });
}

function tokenText(chunk) {
  return chunk.ids.map((id, i) => {
    const logp = chunk.logp[i];
    const surprise = known(logp) ? Math.min(1, -logp / 4) : 0;
    const piece = chunk.pieces ? visible(chunk.pieces[i]) : null;
    return el('span', {
      class: piece === null ? 'token id' : 'token',
      style: { 'background-color': `rgba(var(--shade), ${(surprise * 0.85).toFixed(3)})` },
      title: `token ${id}\nlog-prob ${number(logp)}\nprobability ${known(logp) ? percent(Math.exp(logp)) : '–'}`,
    }, piece === null ? String(id) : piece);
  });
}

function chunkCard(chunk, index, trajectory, largest, shading) {
  const dropped = chunk.kept === false;
  const body = el('pre', { class: 'text' }, shading && chunk.pieces ? tokenText(chunk) : plainText(chunk.text));
  const strip = shading && !chunk.pieces ? el('div', { class: 'text' }, tokenText(chunk)) : null;
  return el('article', {
    class: `card chunk${dropped ? ' dropped' : ''}`, id: `chunk-${index}`, 'data-chunk': chunk.id,
    style: { 'background-image': `linear-gradient(${tint(chunk.return, largest, 0.14)}, ${tint(chunk.return, largest, 0.14)})`,
      'border-left-color': edge(chunk.return, largest) },
  },
  el('div', { class: 'row' }, el('b', {}, `Chunk ${index + 1}`), chunkBadges(chunk, index, trajectory),
    el('span', { class: 'return' }, known(chunk.return) ? `G = ${number(chunk.return)}` : '')),
  body, strip);
}

function observationCard(observation, label) {
  const lines = observation.text.split('\n').length;
  const card = el('article', { class: 'observation' },
    el('header', {}, el('span', {}, label), el('span', {}, plural(observation.tokens, 'token'))),
    el('pre', { class: 'text' }, observation.text === '' ? '(no output)' : visible(observation.text)));
  if (lines > FOLD_LINES || observation.text.length > 1600) {
    card.classList.add('folded');
    card.append(el('button', { type: 'button', onclick: event => {
      const folded = card.classList.toggle('folded');
      event.target.textContent = folded ? `show all ${plural(lines, 'line')}` : 'show less';
    } }, `show all ${plural(lines, 'line')}`));
  }
  return card;
}

function outcome(trajectory) {
  if (!known(trajectory.reward)) return badge('warn', trajectory.status.replace('_', ' '));
  return trajectory.success ? badge('good', `success · reward ${number(trajectory.reward)}`) : badge('bad', `failure · reward ${number(trajectory.reward)}`);
}

function headCard(trajectory, largest) {
  const task = trajectory.task;
  const fact = (name, value) => el('span', {}, `${name} `, el('b', {}, value));
  const facts = [
    task.family && fact('family', task.family), task.horizon > 0 && fact('horizon', String(task.horizon)),
    fact('task', visible(task.id)), fact('status', trajectory.status.replace('_', ' ')), fact('policy', `v${trajectory.version}`),
    fact('seed', String(trajectory.seed)), fact('group', visible(trajectory.group)),
    ...Object.entries(trajectory.timings).map(([name, value]) => fact(name, `${number(value)} s`)),
  ];
  return el('section', { class: 'card' },
    el('div', { class: 'badges' }, outcome(trajectory), trajectory.error && badge('warn', visible(trajectory.error))),
    el('p', { class: 'instruction' }, visible(task.instruction)),
    el('div', { class: 'facts' }, facts),
    el('div', { class: 'strip' }, trajectory.chunks.map((chunk, i) => el('a', {
      href: `#chunk-${i}`, title: `chunk ${i + 1}: G = ${number(chunk.return)}`,
      style: { background: tint(chunk.return, largest, 0.8) },
      onclick: event => { event.preventDefault(); document.getElementById(`chunk-${i}`).scrollIntoView({ block: 'start' }); },
    }, String(i + 1)))));
}

const viewer = {
  step: DATA.steps.length - 1, filter: 'all', family: '', shading: asked.has('shading'), selected: null,

  shown() {
    return DATA.steps[this.step].trajectories.filter(t => (!this.family || t.task.family === this.family)
      && (this.filter === 'all' || (known(t.reward) && t.success === (this.filter === 'success'))));  // no reward: neither
  },

  start(place) {
    if (!DATA.steps.length) {
      place.append(el('p', { class: 'empty' }, 'No trajectories saved yet.'));
      return;
    }
    DATA.steps.forEach((step, i) => step.trajectories.forEach(t => {
      if (t.id === asked.get('trajectory')) { this.step = i; this.selected = t.id; }
    }));
    this.tools = el('div', { class: 'tools' });
    this.list = el('div', { class: 'card list', role: 'listbox', 'aria-label': 'trajectories' });
    this.detail = el('div', { class: 'detail' });
    place.append(this.tools, el('div', { class: 'viewer' }, this.list, this.detail));
    this.showTools();
    this.refresh();
    document.addEventListener('keydown', event => {
      if (event.target.closest('input, select') || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === 'j') this.move(1);
      if (event.key === 'k') this.move(-1);
    });
  },

  showTools() {
    const steps = el('select', { id: 'step', onchange: event => { this.step = +event.target.value; this.selected = null; this.refresh(); } },
      DATA.steps.map((step, i) => el('option', { value: i, selected: i === this.step }, `${step.step} · ${step.successes} of ${step.total} succeed`)));
    const families = [...new Set(DATA.steps.flatMap(s => s.trajectories.map(t => t.task.family)))].filter(f => f).sort();
    const choose = ['all', 'success', 'failure'].map(name => el('button', { type: 'button', 'data-filter': name, 'aria-pressed': String(name === this.filter),
      onclick: () => {
        this.filter = name;
        choose.forEach(button => button.setAttribute('aria-pressed', String(button.dataset.filter === name)));
        this.refresh();
      } }, name));
    const shade = el('input', { type: 'checkbox', id: 'shading', checked: this.shading, onchange: event => { this.shading = event.target.checked; this.refresh(); } });
    this.tools.append(el('label', {}, 'step', steps), el('span', { class: 'segmented' }, choose));
    if (families.length > 1) this.tools.append(el('label', {}, 'family', el('select', { id: 'family', onchange: event => { this.family = event.target.value; this.refresh(); } },
      el('option', { value: '' }, 'all'), families.map(name => el('option', { value: name }, name)))));
    this.tools.append(el('label', { title: 'shade each token by −log-prob under the policy that sampled it' }, shade, 'token log-probs'));
    const scale = (from, to) => el('span', { class: 'scale', style: { background: `linear-gradient(90deg, ${from}, ${to})` } });
    this.tools.append(el('p', { class: 'hint' }, 'return −', scale('rgba(var(--bad-rgb), .8), transparent', 'rgba(var(--good-rgb), .8)'), '+',
      '  token sure', scale('transparent', 'rgba(var(--shade), .85)'), 'unlikely   keys j, k'));
  },

  move(by) {
    const shown = this.shown();
    const at = shown.findIndex(t => t.id === this.selected);
    const next = shown[Math.max(0, Math.min(shown.length - 1, at + by))];
    if (next) { this.selected = next.id; this.refresh(); }
  },

  refresh() {
    const shown = this.shown();
    const step = DATA.steps[this.step];
    if (!shown.some(t => t.id === this.selected)) this.selected = shown.length ? shown[0].id : null;
    this.list.replaceChildren(...shown.map(t => el('button', {
      type: 'button', role: 'option', 'data-trajectory': t.id, 'aria-current': String(t.id === this.selected),
      onclick: () => { this.selected = t.id; this.refresh(); },
    }, el('i', { class: `dot ${known(t.reward) ? (t.success ? 'good' : 'bad') : ''}` }), el('span', { class: 'name' }, visible(t.task.id)),
    el('span', {}, known(t.reward) ? number(t.reward) : '–'),
    el('span', { class: 'sub' }, [t.task.family, t.task.horizon > 0 && `h ${t.task.horizon}`, plural(t.chunks.length, 'chunk'), !known(t.reward) && t.status.replace('_', ' ')].filter(x => x).join(' · ')))));
    if (step.total > step.trajectories.length) this.list.append(el('p', { class: 'hint' }, `${step.trajectories.length} of the step's ${step.total} trajectories are in this page.`));
    if (!shown.length) this.list.append(el('p', { class: 'hint' }, 'None here.'));
    this.scrollList();
    this.detail.replaceChildren(...this.cards(shown.find(t => t.id === this.selected)));
  },

  /** Scrolls the list alone: scrollIntoView would move the page too. */
  scrollList() {
    const item = this.list.querySelector('[aria-current="true"]');
    if (!item) return;
    const top = item.offsetTop - this.list.offsetTop;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + item.offsetHeight > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + item.offsetHeight - this.list.clientHeight;
  },

  cards(trajectory) {
    if (!trajectory) return [el('p', { class: 'empty' }, 'No trajectory matches.')];
    const returns = trajectory.chunks.map(chunk => chunk.return).filter(known);
    const largest = Math.max(1e-9, ...returns.map(Math.abs));
    const turns = [];
    if (trajectory.prompt.text) turns.push(observationCard(trajectory.prompt, 'prompt'));
    trajectory.chunks.forEach((chunk, i) => {
      turns.push(chunkCard(chunk, i, trajectory, largest, this.shading));
      if (trajectory.observations[i]) turns.push(observationCard(trajectory.observations[i], 'observation'));
    });
    const finish = known(trajectory.reward) ? `verifier: reward ${number(trajectory.reward)}` : `no reward: ${trajectory.status.replace('_', ' ')}`;
    return [headCard(trajectory, largest), el('div', { class: 'turns' }, turns), el('p', { class: 'end' }, finish)];
  },
};
viewer.start(document.getElementById('viewer'));
