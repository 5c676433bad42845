// A thin view: Python draws the panes, this puts them in place and sends back what a person does.
// data-act, data-kind and data-value on an element say what a click on it means; a [role=grid] says it for its cells.

let made = 0;

// All views of a page are painted together. Each has a module of its own, so what they share hangs on the window.
const page = (globalThis.labkitPage ??= { views: new Set(), models: new Set(), painted: -Infinity, timer: 0, frame: 0 });

/** Paint every view that something came for. */
function paintAll() {
  clearTimeout(page.timer);
  cancelAnimationFrame(page.frame);
  page.timer = page.frame = 0;
  page.painted = performance.now();
  page.models.clear();
  for (const view of page.views) view.paint();
  page.views.clear();
}

/** What a grid said about its cells (see draw.grid). */
function facts(grid) {
  grid.lab ??= JSON.parse(grid.dataset.grid);
  return grid.lab;
}

/** x, y, width, height of a cell, null for one that is not drawn. */
function place(grid, cell) {
  const { rows, x, pitch, h } = facts(grid);
  const row = rows.find(([, first, count]) => first <= cell && cell < first + count);
  return row ? [x + (cell - row[1]) * pitch, row[0], pitch, h] : null;
}

/** The cell under the pointer, null between cells. */
function cellUnder(grid, event) {
  const matrix = grid.ownerSVGElement.getScreenCTM();
  if (!matrix) return null;
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
  const { rows, x, pitch, h } = facts(grid);
  for (const [y, first, count] of rows) {
    const col = Math.floor((at.x - x) / pitch);
    if (at.y >= y - 2 && at.y <= y + h + 1 && col >= 0 && col < count) return first + col;
  }
  return null;
}

/** The sentence about a cell. */
function words(grid, cell) {
  const { each, none, values, base, size } = facts(grid);
  const run = values.find(([first, count]) => first <= cell && cell < first + count);
  const parts = {
    i: () => cell,
    h: () => '0x' + cell.toString(16),
    a: () => '0x' + (BigInt(base) + BigInt(cell) * BigInt(size)).toString(16),
    v: () => (run ? run[2] : ''),
  };
  return (run ? each : none || each).replace(/\{([ihav])\}/g, (_, key) => parts[key]());
}

/** The cell that an arrow key leads to. */
function neighbour(grid, cell, key) {
  const rows = facts(grid).rows;
  const at = rows.findIndex(([, first, count]) => first <= cell && cell < first + count);
  if (at < 0) return rows.length ? rows[0][1] : null;
  const [, first, count] = rows[at];
  const col = cell - first;
  const to = { ArrowLeft: [at, col - 1], ArrowRight: [at, col + 1], ArrowUp: [at - 1, col], ArrowDown: [at + 1, col], Home: [at, 0], End: [at, count - 1] }[key];
  let [row, next] = to;
  if (next < 0) [row, next] = [row - 1, Infinity];
  else if (next >= count && key === 'ArrowRight') [row, next] = [row + 1, 0];
  if (row < 0 || row >= rows.length) return cell;
  return rows[row][1] + Math.min(next, rows[row][2] - 1);
}

class LabView {
  constructor(model, el) {
    this.model = model;
    this.id = ++made;
    this.dirty = new Set();
    this.sent = model.get('acks');
    this.spoken = -Infinity;
    this.hovering = false;
    this.cursors = new Map(); // grid name -> active cell
    this.root = document.createElement('section');
    this.root.className = 'lk';
    this.root.tabIndex = 0;
    this.root.setAttribute('aria-label', 'labkit view');
    this.root.innerHTML = model.get('layout_html');
    this.panes = new Map([...this.root.querySelectorAll('[data-pane]')].map((pane) => [pane.dataset.pane, pane]));
    el.append(this.root);
    this.ends = [];
    this.listen();
    for (const name of this.panes.keys()) this.dirty.add(name);
    this.paint();
    model.send({ act: 'hello' });
  }

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
    change('acks', () => this.waiting());
    on(this.root, 'click', (event) => this.click(event));
    on(this.root, 'pointermove', (event) => this.hover(event));
    on(this.root, 'pointerleave', () => this.unhover());
    on(this.root, 'focusin', (event) => this.focused(event));
    on(this.root, 'focusout', (event) => this.blurred(event));
    // JupyterLab listens on the document, capturing; the window comes before it
    on(window, 'keydown', (event) => this.key(event), true);
    const measure = new ResizeObserver(() => this.measured());
    measure.observe(this.root);
    this.ends.push(() => measure.disconnect());
  }

  close() {
    this.model.send({ act: 'bye' });
    page.views.delete(this);
    clearTimeout(this.speaking);
    clearTimeout(this.measuring);
    for (const end of this.ends) end();
  }

  // ---- from Python to the page

  /** Something to paint, when all messages that left Python together are here; one for another page holds them up for 30 ms. */
  queue(name) {
    this.dirty.add(name);
    page.views.add(this);
    page.timer ||= setTimeout(paintAll, 30);
  }

  /** A whole message is here. The last of its batch paints: at once after a pause, else with the next frame. */
  arrived() {
    this.queue('title');
    page.models.add(this.model);
    if (page.models.size < this.model.get('batch')[1]) return;
    if (performance.now() - page.painted > 30) paintAll();
    else page.frame ||= requestAnimationFrame(paintAll);
  }

  /** Swap in what changed. */
  paint() {
    const focus = this.focusPath();
    for (const name of this.dirty) {
      const pane = this.panes.get(name);
      const html = this.model.get(`pane_${name}`);
      if (!pane || pane.shown === html) continue;
      pane.shown = html;
      if (name === 'status') this.speak(pane, html);
      else pane.innerHTML = html;
    }
    this.dirty.clear();
    this.root.dataset.step = this.model.get('step');
    this.refocus(focus);
  }

  /** The status line: new words at once, but announced at most every 500 ms. */
  speak(pane, html) {
    if (this.hovering) return;
    const soon = performance.now() - this.spoken < 500;
    pane.innerHTML = html;
    const line = pane.firstElementChild;
    if (!line) return;
    clearTimeout(this.speaking);
    if (soon) {
      line.setAttribute('aria-live', 'off');
      this.speaking = setTimeout(() => {
        line.setAttribute('aria-live', 'polite');
        line.append(document.createTextNode(''));
        line.textContent = line.textContent;
        this.spoken = performance.now();
      }, 500);
    } else {
      this.spoken = performance.now();
    }
  }

  say(sentence) {
    const line = this.root.querySelector('.status');
    if (line) line.textContent = sentence;
  }

  waiting() {
    this.root.classList.toggle('wait', this.model.get('acks') < this.sent);
  }

  measured() {
    clearTimeout(this.measuring);
    this.measuring = setTimeout(() => {
      const width = this.root.offsetWidth;
      if (width > 0 && Math.abs(width - this.model.get('width')) >= 4) {
        this.model.set('width', width);
        this.model.save_changes();
      }
    }, 60);
  }

  // ---- from a person to Python

  send(message) {
    this.sent = Math.max(this.sent, this.model.get('acks')) + 1;
    this.waiting();
    this.model.send(message);
  }

  open(grid, cell) {
    this.cursors.set(this.nameOf(grid), cell);
    this.send({ act: 'select', kind: grid.dataset.kind, value: cell, arg: grid.dataset.arg });
  }

  click(event) {
    const target = event.target.closest('[data-act],[role=grid]');
    if (!target || !this.root.contains(target)) return;
    if (target.getAttribute('role') === 'grid') {
      const cell = cellUnder(target, event);
      target.focus({ preventScroll: true });
      if (cell !== null) this.open(target, cell);
      return;
    }
    const { act, kind, value } = target.dataset;
    this.send({ act, kind, value });
  }

  hover(event) {
    const grid = event.target.closest?.('[role=grid]');
    const cell = grid ? cellUnder(grid, event) : null;
    const sentence = cell !== null ? words(grid, cell) : event.target.closest?.('[data-say]')?.dataset.say;
    if (!sentence) return this.unhover();
    this.hovering = true;
    this.say(sentence);
  }

  unhover() {
    if (!this.hovering) return;
    this.hovering = false;
    const pane = this.panes.get('status');
    if (pane) pane.innerHTML = pane.shown ?? '';
  }

  key(event) {
    if (!this.root.contains(event.target) || event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input')) return;
    if (this.handled(event)) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
  }

  handled(event) {
    const { key, target } = event;
    const grid = target.closest('[role=grid]');
    if (grid && this.gridKey(grid, key)) return true;
    if (target.getAttribute('role') === 'tab' && this.tabKey(target, key)) return true;
    if (key === 'Escape') return this.escape(target);
    if (key === '/') return this.find();
    if (key.toLowerCase() === 'p' && this.panes.has('ruler')) return this.send({ act: 'pin' }), true;
    const name = (event.shiftKey ? 'Shift+' : '') + (key.length === 1 ? key.toUpperCase() : key);
    const button = this.root.querySelector(`[aria-keyshortcuts="${CSS.escape(name)}"]`);
    if (!button) return false;
    if (!event.repeat || !this.root.classList.contains('wait')) button.click(); // a held key does not outrun the guest
    return true;
  }

  gridKey(grid, key) {
    const cell = this.cursors.get(this.nameOf(grid)) ?? facts(grid).at ?? facts(grid).rows[0]?.[1] ?? null;
    if (cell === null) return false;
    if (/^(Arrow|Home|End)/.test(key)) {
      this.point(grid, neighbour(grid, cell, key));
      return true;
    }
    if (key === 'Enter' || key === ' ' || key.toLowerCase() === 'w') {
      this.open(grid, cell);
      if (key.toLowerCase() === 'w') this.panes.get('walk')?.scrollIntoView({ block: 'nearest' });
      return true;
    }
    return false;
  }

  tabKey(tab, key) {
    if (key === 'Enter' || key === ' ') return tab.click(), true;
    const next = { ArrowLeft: tab.previousElementSibling, ArrowRight: tab.nextElementSibling }[key];
    if (next === undefined) return false;
    if (next) {
      next.focus();
      next.click();
    }
    return true;
  }

  /** Lets go of the grid and the selection; once more hands the keys back to the notebook. */
  escape(target) {
    const chosen = this.root.querySelector('.rail');
    if (chosen) this.send({ act: 'select', kind: 'none', value: null });
    if (target !== this.root) this.root.focus();
    else if (!chosen) {
      this.root.blur();
      this.root.parentElement.closest('[tabindex]')?.focus();
    }
    return true;
  }

  find() {
    this.root.querySelector('.find')?.remove();
    const input = document.createElement('input');
    Object.assign(input, { className: 'find', placeholder: 'symbol', ariaLabel: 'find a symbol' });
    input.addEventListener('keydown', (event) => {
      event.stopPropagation();
      if (event.key === 'Enter') this.send({ act: 'select', kind: 'symbol', value: input.value });
      if (event.key === 'Enter' || event.key === 'Escape') {
        input.remove();
        this.root.focus();
      }
    });
    (this.panes.get('rail') ?? this.root).after(input);
    input.focus();
    return true;
  }

  // ---- focus, and the cursor of a grid

  nameOf(grid) {
    return grid.dataset.kind + (grid.dataset.arg ?? '');
  }

  /** The cell that keys act on: outlined, named to a screen reader, spelled out in the status line. */
  point(grid, cell) {
    const where = place(grid, cell);
    if (!where) return;
    this.cursors.set(this.nameOf(grid), cell);
    let mark = grid.querySelector('.c-cursor');
    if (!mark) {
      mark = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
      mark.setAttribute('class', 'c-cursor');
      mark.setAttribute('role', 'gridcell');
      mark.setAttribute('pointer-events', 'none');
      mark.id = `lab-${this.id}-${this.nameOf(grid)}`;
      grid.append(mark);
    }
    const [x, y, w, h] = where;
    for (const [name, value] of Object.entries({ x: x - 2, y: y - 2, width: w + 3, height: h + 4 })) mark.setAttribute(name, value);
    const sentence = words(grid, cell);
    mark.setAttribute('aria-label', sentence);
    grid.setAttribute('aria-activedescendant', mark.id);
    this.hovering = true;
    this.say(sentence);
  }

  focused(event) {
    const grid = event.target.closest('[role=grid]');
    if (grid && !grid.querySelector('.c-cursor')) {
      const start = this.cursors.get(this.nameOf(grid)) ?? facts(grid).at ?? facts(grid).rows[0]?.[1];
      if (start !== undefined) this.point(grid, start);
    }
  }

  blurred(event) {
    event.target.closest('[role=grid]')?.querySelector('.c-cursor')?.remove();
    this.unhover();
  }

  /** What has the focus, in words that survive a swap. */
  focusPath() {
    const active = this.root.getRootNode().activeElement;
    if (!active || active === this.root || !this.root.contains(active)) return null;
    const grid = active.closest('[role=grid]');
    if (grid) return { grid: this.nameOf(grid) };
    if (active.getAttribute('role') === 'tab') return { query: '[role=tab][aria-selected=true]' };
    const label = active.getAttribute('aria-label');
    return label ? { query: `[aria-label="${CSS.escape(label)}"]` } : { query: null };
  }

  refocus(path) {
    if (!path) return;
    const active = this.root.getRootNode().activeElement;
    if (active && active !== document.body && this.root.contains(active)) return;
    const grids = [...this.root.querySelectorAll('[role=grid]')];
    const target = path.grid ? grids.find((grid) => this.nameOf(grid) === path.grid) : path.query && this.root.querySelector(path.query);
    (target || this.root).focus({ preventScroll: true });
  }
}

export default {
  render({ model, el }) {
    const view = new LabView(model, el);
    return () => view.close();
  },
};
