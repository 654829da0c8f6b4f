(() => {
  document.documentElement.classList.add("scripted");

  // Tabs: arrow keys, Home and End move between them, as the ARIA practices have it.
  for (const group of document.querySelectorAll(".tabs")) {
    const tabs = [...group.querySelector('[role="tablist"]').children];
    const select = (chosen, focus) => {
      for (const tab of tabs) {
        const on = tab === chosen;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
      }
      if (focus) chosen.focus();
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => select(tab, false));
      tab.addEventListener("keydown", (event) => {
        const last = tabs.length - 1;
        const to = { ArrowRight: place === last ? 0 : place + 1, ArrowLeft: place === 0 ? last : place - 1, Home: 0, End: last }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        select(tabs[to], true);
      });
    });
    select(tabs[0], false);
  }

  // Sliders: one of the figures behind each is shown.
  for (const slider of document.querySelectorAll("[data-slider]")) {
    const input = slider.querySelector("input"), output = slider.querySelector("output");
    const figures = [...slider.parentElement.querySelectorAll(".setting")];
    const show = () => {
      figures.forEach((figure, place) => { figure.hidden = place !== Number(input.value); });
      const label = figures[Number(input.value)].dataset.label;
      output.textContent = label;
      input.setAttribute("aria-valuetext", label);
    };
    input.addEventListener("input", show);
    show();
  }

  // Charts: the values at the step under the pointer, or where the arrow keys lead.
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const written = (value) => value === null ? "not a number" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
  for (const svg of document.querySelectorAll("[data-chart]")) {
    const { x: [left, right, first, last], series } = charts[svg.dataset.chart];
    const cursor = svg.querySelector(".cursor"), values = svg.parentElement.querySelector(".values");
    const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
    let at = steps.length - 1;
    const nearest = (list, step) => list.reduce((best, other, i) => Math.abs(other - step) < Math.abs(list[best] - step) ? i : best, 0);
    const show = () => {
      const step = steps[at], place = left + (step - first) / (last - first) * (right - left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      const lines = series.filter((one) => one.steps.length).map((one) => {
        const i = nearest(one.steps, step);
        return `${one.name} ${written(one.values[i])}${one.steps[i] === step ? "" : ` (at ${written(one.steps[i])})`}`;
      });
      values.textContent = [`step ${written(step)}`, ...lines].join("\n");
      const before = place > (left + right) / 2;
      values.style.right = before ? "auto" : "0";
      values.style.left = before ? "0" : "auto";
      values.hidden = false;
    };
    const hide = () => { cursor.setAttribute("visibility", "hidden"); values.hidden = true; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      at = nearest(steps, first + (place - left) / (right - left) * (last - first));
      show();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
    svg.addEventListener("keydown", (event) => {
      const stride = Math.max(1, Math.round(steps.length / 50));
      const to = { ArrowRight: at + stride, ArrowLeft: at - stride, Home: 0, End: steps.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      at = Math.min(steps.length - 1, Math.max(0, to));
      show();
    });
  }

  // Commands: a button that copies; where the browser does not let it, the text is selected.
  for (const block of document.querySelectorAll("pre")) {
    const button = document.createElement("button"), code = block.querySelector("code");
    button.type = "button";
    button.className = "copy";
    button.textContent = "copy";
    button.setAttribute("aria-label", "Copy the command");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
})();
