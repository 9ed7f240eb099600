// The question before something is deleted.

const dialog = document.getElementById("confirm");

/** Ask, and resolve to whether it is to be done. */
export function confirmed(question, words) {
  document.getElementById("confirm-title").textContent = question;
  document.getElementById("confirm-words").textContent = words;
  dialog.returnValue = "keep";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
  });
}
