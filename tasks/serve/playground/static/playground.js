// Keyboard, paste and drop. Everything else is in Python.
(() => {
  const visible = (selector) => [...document.querySelectorAll(selector)].find((one) => one.offsetParent !== null);
  const uploader = () => getElement(document.querySelector(".uploader")).$refs.qRef;
  const imagesOf = (transfer) => [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));

  function neighbour(result, key) {
    const all = [...result.closest(".grid, .strip").querySelectorAll(".result")];
    const tops = all.map((one) => one.getBoundingClientRect().top);
    const columns = tops.filter((top) => Math.abs(top - tops[0]) < 4).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    return step && all[all.indexOf(result) + step];
  }

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.isComposing || document.querySelector(".q-dialog, .q-menu")) return;
    if (event.key === "Enter" && !event.shiftKey && target.closest(".run-on-enter, .options input[type=number]")) {
      event.preventDefault();
      visible(".run")?.click();
    } else if (event.key === "Escape") {
      (visible(".cancel") ?? visible(".close-details"))?.click();
    } else if (target.matches(".result")) {
      const next = neighbour(target, event.key);
      if (next) {
        event.preventDefault();
        next.focus();
      }
    }
  });

  document.addEventListener("paste", (event) => {
    const images = imagesOf(event.clipboardData);
    if (!images.length || !visible(".prompt")) return;
    event.preventDefault();
    uploader().addFiles(images.slice(0, 1));
  });

  const dragged = (event, on) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return false;
    event.preventDefault(); // otherwise the browser leaves the page for the file
    document.body.classList.toggle("dragging", on);
    return true;
  };
  document.addEventListener("dragover", (event) => dragged(event, true));
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && dragged(event, false));
  document.addEventListener("drop", (event) => {
    if (dragged(event, false) && visible(".prompt")) uploader().addFiles([...event.dataTransfer.files].slice(0, 1));
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest(".pick-image")) uploader().pickFiles();
  });

  document.addEventListener("input", (event) => {
    if (event.target.matches(".split")) event.target.parentElement.style.setProperty("--split", `${event.target.value}%`);
  });

  const missing = (event) => event.target.tagName === "IMG" && event.target.classList.add("missing");
  document.addEventListener("error", missing, true); // errors of images do not bubble

  window.addEventListener("popstate", () => location.reload());
})();
