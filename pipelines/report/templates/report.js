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
