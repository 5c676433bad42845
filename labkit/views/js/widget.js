// A thin view: Python draws the panes, this puts them in place and sends back what a person does.
//
// data-act, data-kind and data-value on an element say what a click on it means; a [role=grid] says
// it for its cells, with the facts that drawing/cells.py wrote into its data-grid.
//
// The parts of this file: painting together, cells of a grid, one view (life, from Python to the
// page, clicks and hover, keys, focus).

// ---------------------------------------------------------------------------------------------
// Painting together
//
// All views of a page are painted in one go. Each has a module of its own, so what they share
// hangs on the window.

const PAUSE = 30; // ms: after that long without a paint the next one need not wait for a frame

const page = (globalThis.labkitPage ??= {
  views: new Set(), // that have something to paint
  models: new Set(), // of which the message of this batch is here
  painted: -Infinity, // when
  timer: 0,
  frame: 0,
});

/** Paint every view that something came for. */
function paintAll() {
  clearTimeout(page.timer);
  cancelAnimationFrame(page.frame);
  page.timer = 0;
  page.frame = 0;
  page.painted = performance.now();
  page.models.clear();
  for (const view of page.views) view.paint();
  page.views.clear();
}

// ---------------------------------------------------------------------------------------------
// Cells of a grid
//
// A grid's rows are [y, first cell, number of cells]; its values [first cell, number, words].

/** What a grid said about its cells (see grid() in drawing/cells.py), parsed once. */
function facts(grid) {
  grid.lab ??= JSON.parse(grid.dataset.grid);
  return grid.lab;
}

/** A name that survives a swap of the pane: two tables of one picture have the same kind. */
function nameOf(grid) {
  return grid.dataset.kind + (grid.dataset.arg ?? '');
}

function holds(first, count, cell) {
  return first <= cell && cell < first + count;
}

/** x, y, width, height of a cell, null for one that is not drawn. */
function place(grid, cell) {
  const { rows, x, pitch, h } = facts(grid);
  const row = rows.find(([, first, count]) => holds(first, count, cell));
  if (!row) return null;
  const [y, first] = row;
  return [x + (cell - first) * pitch, y, pitch, h];
}

/** The cell under the pointer, null between cells. */
function cellUnder(grid, event) {
  const matrix = grid.ownerSVGElement.getScreenCTM();
  if (!matrix) return null;
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());

  const { rows, x, pitch, h } = facts(grid);
  const column = Math.floor((at.x - x) / pitch);
  for (const [y, first, count] of rows) {
    const inRow = at.y >= y - 2 && at.y <= y + h + 1;
    if (inRow && column >= 0 && column < count) return first + column;
  }
  return null;
}

/** The sentence about a cell. */
function words(grid, cell) {
  const { each, none, values, base, size } = facts(grid);
  const value = values.find(([first, count]) => holds(first, count, cell));
  const parts = {
    i: () => cell,
    h: () => '0x' + cell.toString(16),
    a: () => '0x' + (BigInt(base) + BigInt(cell) * BigInt(size)).toString(16),
    v: () => (value ? value[2] : ''),
  };
  const sentence = value ? each : none || each;
  return sentence.replace(/\{([ihav])\}/g, (_, name) => parts[name]());
}

/** The cell that an arrow key, Home or End leads to; null in a grid without cells. */
function neighbour(grid, cell, key) {
  const rows = facts(grid).rows;
  const at = rows.findIndex(([, first, count]) => holds(first, count, cell));
  if (at < 0) return rows.length ? rows[0][1] : null;

  const [, first, count] = rows[at];
  const column = cell - first;
  const targets = {
    ArrowLeft: [at, column - 1],
    ArrowRight: [at, column + 1],
    ArrowUp: [at - 1, column],
    ArrowDown: [at + 1, column],
    Home: [at, 0],
    End: [at, count - 1],
  };
  let [row, next] = targets[key];
  if (next < 0) {
    row -= 1; // the last cell of the row above
    next = Infinity;
  } else if (next >= count && key === 'ArrowRight') {
    row += 1;
    next = 0;
  }
  if (row < 0 || row >= rows.length) return cell;
  const [, firstThere, countThere] = rows[row];
  return firstThere + Math.min(next, countThere - 1);
}

// ---------------------------------------------------------------------------------------------
// One view

const ANNOUNCE = 500; // ms: at most one announcement in that time while something runs
const MEASURE = 60; // ms: a width is measured when it has stood still that long
const PATIENCE = 4000; // ms: who does not answer for that long may be gone
const FOLDS = 'labkit-folds'; // where a browser keeps which panes are folded
const GONE = `No kernel answers this view: it is busy, was restarted, or is gone. Clicks do nothing \
until it answers. If it was restarted, run the cell again for a live view.`;
const KEYS = [
  ['/', 'find a symbol'],
  ['arrows', 'in a grid: move; Enter chooses, W shows the walk'],
  ['P', 'pin the address as a second ruler'],
  ['double click', 'on a line or an instruction: run to it'],
  ['Esc', 'let go of the selection, then hand the keys back to the notebook'],
  ['?', 'this list'],
];

/** Names of the panes that this browser keeps folded; a page without storage keeps none. */
function storedFolds() {
  try {
    return new Set(JSON.parse(localStorage.getItem(FOLDS) ?? '[]'));
  } catch {
    return new Set();
  }
}

function storeFolds(folds) {
  try {
    localStorage.setItem(FOLDS, JSON.stringify([...folds]));
  } catch {
    // a page that may not store anything folds for itself alone
  }
}

let made = 0;

class LabView {
  constructor(model, el) {
    this.model = model;
    this.id = ++made;
    this.dirty = new Set(); // names of panes that something came for
    this.sent = model.get('acks'); // actions sent so far
    this.spoken = -Infinity; // when the status line was last announced
    this.hovering = false; // the status line says what is under the pointer
    this.cursors = new Map(); // name of a grid -> the cell that keys act on
    this.ends = []; // functions that undo what listen() did
    this.pings = 0; // questions whether anybody is there
    this.folds = storedFolds();

    this.root = document.createElement('section');
    this.root.className = 'lk';
    this.root.tabIndex = 0;
    this.root.setAttribute('aria-label', 'labkit view');
    this.root.innerHTML = model.get('layout_html');
    this.panes = new Map();
    for (const pane of this.root.querySelectorAll('[data-pane]')) {
      this.panes.set(pane.dataset.pane, pane);
    }

    el.append(this.root);
    this.listen();
    for (const name of this.panes.keys()) this.dirty.add(name);
    this.paint();
    this.ask('hello');
  }

  lost = () => this.ask('ping');

  listen() {
    const on = (target, type, handler, options) => {
      target.addEventListener(type, handler, options);
      this.ends.push(() => target.removeEventListener(type, handler, options));
    };
    const change = (name, handler) => {
      this.model.on(`change:${name}`, handler);
      this.ends.push(() => this.model.off(`change:${name}`, handler));
    };

    for (const name of this.panes.keys()) change(`pane_${name}`, () => this.queue(name));
    change('batch', () => queueMicrotask(() => this.arrived()));
    change('acks', () => {
      this.waiting();
      this.answered();
    });
    change('heard', () => this.answered());
    // ipywidgets says so when the kernel of a view is restarted, gone or back
    this.model.on('comm_live_update', this.lost);
    this.ends.push(() => this.model.off('comm_live_update', this.lost));

    on(this.root, 'click', (event) => this.click(event));
    on(this.root, 'dblclick', (event) => this.doubleClick(event));
    on(this.root, 'pointermove', (event) => this.hover(event));
    on(this.root, 'pointerleave', () => this.unhover());
    on(this.root, 'focusin', (event) => this.focused(event));
    on(this.root, 'focusout', (event) => this.blurred(event));
    // JupyterLab listens on the document, capturing; the window comes before it.
    on(window, 'keydown', (event) => this.key(event), true);

    const observer = new ResizeObserver(() => this.measured());
    observer.observe(this.root);
    this.ends.push(() => observer.disconnect());
  }

  close() {
    this.tell({ act: 'bye' });
    page.views.delete(this);
    clearTimeout(this.speaking);
    clearTimeout(this.measuring);
    clearTimeout(this.missing);
    for (const end of this.ends) end();
  }

  // ---- from Python to the page

  /**
   * Something to paint, when all messages that left Python together are here.
   *
   * One that went to another page holds them up for a pause.
   */
  queue(name) {
    this.dirty.add(name);
    page.views.add(this);
    page.timer ||= setTimeout(paintAll, PAUSE);
  }

  /** A whole message is here. The last of its batch paints: now, or soon after a paint. */
  arrived() {
    this.queue('title');
    page.models.add(this.model);
    const [, count] = this.model.get('batch');
    if (page.models.size < count) return;
    if (performance.now() - page.painted > PAUSE) paintAll();
    else page.frame ||= requestAnimationFrame(paintAll);
  }

  /** Swap in what changed. */
  paint() {
    const focus = this.focusPath();
    for (const name of this.dirty) this.swap(name);
    this.dirty.clear();
    this.root.dataset.step = this.model.get('step');
    this.refocus(focus);
  }

  swap(name) {
    const pane = this.panes.get(name);
    const html = this.model.get(`pane_${name}`);
    if (!pane || pane.shown === html) return;
    pane.shown = html;
    if (name === 'status') this.speak(pane, html);
    else pane.innerHTML = html;
    this.foldable(pane);
  }

  /** A pane that begins with a label folds under it. */
  foldable(pane) {
    const label = pane.firstElementChild;
    if (!label?.classList.contains('lab')) {
      pane.classList.remove('folded');
      return;
    }
    const isFolded = this.folds.has(pane.dataset.pane);
    pane.classList.toggle('folded', isFolded);
    label.classList.add('fold');
    label.tabIndex = 0;
    label.setAttribute('role', 'button');
    label.setAttribute('aria-expanded', String(!isFolded));
    const name = label.firstChild?.textContent ?? pane.dataset.pane;
    label.setAttribute('aria-label', `${isFolded ? 'Unfold' : 'Fold'} ${name}`);
  }

  fold(pane) {
    const name = pane.dataset.pane;
    if (!this.folds.delete(name)) this.folds.add(name);
    storeFolds(this.folds);
    this.foldable(pane);
  }

  /** The status line: new words at once, but announced only now and then. */
  speak(pane, html) {
    if (this.hovering) return; // unhover() shows them
    pane.innerHTML = html;
    const line = pane.firstElementChild;
    if (!line) return;

    clearTimeout(this.speaking);
    if (performance.now() - this.spoken >= ANNOUNCE) {
      this.spoken = performance.now();
      return;
    }
    line.setAttribute('aria-live', 'off');
    this.speaking = setTimeout(() => {
      line.setAttribute('aria-live', 'polite');
      // A change is announced, so there has to be one.
      line.append(document.createTextNode(''));
      line.textContent = line.textContent;
      this.spoken = performance.now();
    }, ANNOUNCE);
  }

  say(sentence) {
    const line = this.root.querySelector('.status');
    if (line) line.textContent = sentence;
  }

  /** Dim the step counter while an action is under way. */
  waiting() {
    this.root.classList.toggle('wait', this.model.get('acks') < this.sent);
  }

  /** Ask whether a kernel is there. */
  ask(act) {
    this.pings = Math.max(this.pings, this.model.get('heard')) + 1;
    this.tell({ act, value: this.pings });
    this.expect();
  }

  /** A message to Python; a connection that is gone throws. */
  tell(message) {
    try {
      this.model.send(message);
    } catch {
      this.gone();
    }
  }

  /** A view that gets no answer says so. */
  expect() {
    clearTimeout(this.missing);
    this.missing = setTimeout(() => this.gone(), PATIENCE);
  }

  answered() {
    if (this.model.get('heard') < this.pings || this.model.get('acks') < this.sent) return;
    clearTimeout(this.missing);
    this.root.classList.remove('gone');
    this.root.querySelector('.gone-words')?.remove();
  }

  gone() {
    if (this.root.querySelector('.gone-words')) return;
    this.root.classList.add('gone');
    const words = document.createElement('div');
    words.className = 'hole gone-words';
    words.setAttribute('role', 'alert');
    words.textContent = GONE;
    this.root.prepend(words);
  }

  measured() {
    clearTimeout(this.measuring);
    this.measuring = setTimeout(() => {
      const width = this.root.offsetWidth;
      if (width > 0 && Math.abs(width - this.model.get('width')) >= 4) {
        this.model.set('width', width);
        try {
          this.model.save_changes();
        } catch {
          this.gone();
        }
      }
    }, MEASURE);
  }

  // ---- clicks and hover

  send(message) {
    this.sent = Math.max(this.sent, this.model.get('acks')) + 1;
    this.waiting();
    this.tell(message);
    this.expect();
  }

  /** Choose a cell of a grid. */
  open(grid, cell) {
    this.cursors.set(nameOf(grid), cell);
    const { kind, arg } = grid.dataset;
    this.send({ act: 'select', kind, value: cell, arg });
  }

  click(event) {
    const label = event.target.closest('.fold');
    if (label && this.root.contains(label)) {
      this.fold(label.parentElement);
      return;
    }
    const target = event.target.closest('[data-act],[role=grid]');
    if (!target || !this.root.contains(target)) return;
    if (target.getAttribute('role') !== 'grid') {
      const { act, kind, value } = target.dataset;
      this.send({ act, kind, value });
      return;
    }

    const cell = cellUnder(target, event);
    target.focus({ preventScroll: true });
    if (cell !== null) this.open(target, cell);
  }

  /** A double click on a line or an instruction runs to it. */
  doubleClick(event) {
    const gutter = event.target.closest('.code tr')?.querySelector('.bp');
    if (!gutter || event.target.closest('.bp')) return;
    const { kind, value } = gutter.dataset;
    this.send({ act: 'run_to', kind, value });
  }

  /** Say what is under the pointer. */
  hover(event) {
    const grid = event.target.closest?.('[role=grid]');
    const cell = grid ? cellUnder(grid, event) : null;
    let sentence;
    if (cell !== null) sentence = words(grid, cell);
    else sentence = event.target.closest?.('[data-say]')?.dataset.say;

    if (!sentence) {
      this.unhover();
      return;
    }
    this.hovering = true;
    this.say(sentence);
  }

  unhover() {
    if (!this.hovering) return;
    this.hovering = false;
    const pane = this.panes.get('status');
    if (pane) pane.innerHTML = pane.shown ?? '';
  }

  // ---- keys

  /** No key that is pressed in a view is the notebook's; Tab and the browser's own go on. */
  key(event) {
    if (!this.root.contains(event.target) || event.target.matches('input')) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === 'Tab' || /^F\d+$/.test(event.key)) return;
    event.stopImmediatePropagation();
    if (this.handled(event)) event.preventDefault();
  }

  /** Whether a key was one of ours. */
  handled(event) {
    const { key, target } = event;
    const grid = target.closest('[role=grid]');
    if (grid && this.gridKey(grid, key)) return true;
    if (target.getAttribute('role') === 'tab' && this.tabKey(target, key)) return true;
    if (key === 'Escape') {
      this.escape(target);
      return true;
    }
    if (key === '/') {
      this.find();
      return true;
    }
    if (key === '?') {
      this.listKeys();
      return true;
    }
    const isPressed = key === 'Enter' || key === ' ';
    if (isPressed && target.getAttribute('role') === 'button') {
      target.click();
      return true;
    }
    if (key.toLowerCase() === 'p' && this.panes.has('ruler')) {
      this.send({ act: 'pin' });
      return true;
    }
    return this.buttonKey(event);
  }

  /** The key of a button that is on offer presses it. */
  buttonKey(event) {
    const { key, shiftKey, repeat } = event;
    const name = (shiftKey ? 'Shift+' : '') + (key.length === 1 ? key.toUpperCase() : key);
    const button = this.root.querySelector(`[aria-keyshortcuts="${CSS.escape(name)}"]`);
    if (!button) return false;
    const isWaiting = this.root.classList.contains('wait');
    if (!repeat || !isWaiting) button.click(); // a held key does not outrun the guest
    return true;
  }

  /** Arrows move in a grid, Enter and space choose, W chooses and shows the walk. */
  gridKey(grid, key) {
    const cell = this.cursorOf(grid);
    if (cell === null) return false;
    if (/^(Arrow|Home|End)/.test(key)) {
      this.point(grid, neighbour(grid, cell, key));
      return true;
    }
    const walks = key.toLowerCase() === 'w';
    if (!walks && key !== 'Enter' && key !== ' ') return false;
    this.open(grid, cell);
    if (walks) this.panes.get('walk')?.scrollIntoView({ block: 'nearest' });
    return true;
  }

  tabKey(tab, key) {
    if (key === 'Enter' || key === ' ') {
      tab.click();
      return true;
    }
    if (key !== 'ArrowLeft' && key !== 'ArrowRight') return false;
    const isLeft = key === 'ArrowLeft';
    const next = isLeft ? tab.previousElementSibling : tab.nextElementSibling;
    next?.focus();
    next?.click();
    return true;
  }

  /** Lets go of the grid and the selection; once more hands the keys back to the notebook. */
  escape(target) {
    const chosen = this.root.querySelector('.rail');
    if (chosen) this.send({ act: 'select', kind: 'none', value: null });
    if (target !== this.root) {
      this.root.focus();
    } else if (!chosen) {
      this.root.blur();
      this.root.parentElement.closest('[tabindex]')?.focus();
    }
  }

  /** The keys of this view under its buttons, or away again. */
  listKeys() {
    const shown = this.root.querySelector('.keys');
    if (shown) {
      shown.remove();
      return;
    }
    const list = document.createElement('dl');
    list.className = 'keys';
    list.setAttribute('aria-label', 'keys');
    const buttons = [...this.root.querySelectorAll('.tp button[aria-keyshortcuts]')];
    const ofButtons = buttons.map((button) => [
      button.querySelector('kbd').textContent,
      button.getAttribute('aria-label'),
    ]);
    for (const [key, words] of [...ofButtons, ...KEYS]) {
      const row = document.createElement('div');
      const cap = document.createElement('kbd');
      cap.textContent = key;
      row.append(cap, ` ${words}`);
      list.append(row);
    }
    (this.panes.get('transport') ?? this.root.firstElementChild).after(list);
  }

  /** A field for the name of a symbol, under the selection. */
  find() {
    this.root.querySelector('.find')?.remove();
    const input = document.createElement('input');
    Object.assign(input, { className: 'find', placeholder: 'symbol', ariaLabel: 'find a symbol' });
    input.addEventListener('keydown', (event) => {
      event.stopPropagation();
      if (event.key !== 'Enter' && event.key !== 'Escape') return;
      if (event.key === 'Enter') this.send({ act: 'select', kind: 'symbol', value: input.value });
      input.remove();
      this.root.focus();
    });
    (this.panes.get('rail') ?? this.root).after(input);
    input.focus();
  }

  // ---- focus, and the cursor of a grid

  /** The cell that keys act on, first the selected one; null in a grid without cells. */
  cursorOf(grid) {
    const { at, rows } = facts(grid);
    return this.cursors.get(nameOf(grid)) ?? at ?? rows[0]?.[1] ?? null;
  }

  /** Move the cursor: outlined, named to a screen reader, spelled out in the status line. */
  point(grid, cell) {
    const where = place(grid, cell);
    if (!where) return;
    this.cursors.set(nameOf(grid), cell);

    const mark = grid.querySelector('.c-cursor') ?? this.newCursor(grid);
    const [x, y, w, h] = where;
    const sides = { x: x - 2, y: y - 2, width: w + 3, height: h + 4 };
    for (const [name, value] of Object.entries(sides)) mark.setAttribute(name, value);

    const sentence = words(grid, cell);
    mark.setAttribute('aria-label', sentence);
    grid.setAttribute('aria-activedescendant', mark.id);
    this.hovering = true;
    this.say(sentence);
  }

  newCursor(grid) {
    const mark = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
    mark.setAttribute('class', 'c-cursor');
    mark.setAttribute('role', 'gridcell');
    mark.setAttribute('pointer-events', 'none');
    mark.id = `lab-${this.id}-${nameOf(grid)}`;
    grid.append(mark);
    return mark;
  }

  focused(event) {
    const grid = event.target.closest('[role=grid]');
    if (!grid || grid.querySelector('.c-cursor')) return;
    const cell = this.cursorOf(grid);
    if (cell !== null) this.point(grid, cell);
  }

  blurred(event) {
    event.target.closest('[role=grid]')?.querySelector('.c-cursor')?.remove();
    this.unhover();
  }

  /** What has the focus, in words that survive a swap; null when that is nothing in a pane. */
  focusPath() {
    const active = this.root.getRootNode().activeElement;
    if (!active || active === this.root || !this.root.contains(active)) return null;
    const grid = active.closest('[role=grid]');
    if (grid) return { grid: nameOf(grid) };
    if (active.getAttribute('role') === 'tab') return { query: '[role=tab][aria-selected=true]' };
    const label = active.getAttribute('aria-label');
    return { query: label ? `[aria-label="${CSS.escape(label)}"]` : null };
  }

  /** Give the focus back to what had it, where a swap took it away; else to the view. */
  refocus(path) {
    if (!path) return;
    const active = this.root.getRootNode().activeElement;
    if (active && active !== document.body && this.root.contains(active)) return;

    let target = null;
    if (path.grid) {
      const grids = [...this.root.querySelectorAll('[role=grid]')];
      target = grids.find((grid) => nameOf(grid) === path.grid);
    } else if (path.query) {
      target = this.root.querySelector(path.query);
    }
    (target || this.root).focus({ preventScroll: true });
  }
}

export default {
  render({ model, el }) {
    const view = new LabView(model, el);
    return () => view.close();
  },
};
