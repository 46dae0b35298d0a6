// Addresses within the page, that can be shared:
//   #/            #/STORE?sort=nll            #/STORE/KEY?t=POSITION            #/STORE/KEY/compare/OTHER?t=POSITION

export function link(parts, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const each of [value].flat())
      if (each !== undefined && each !== null && each !== "" && each !== false) query.append(name, each);
  }
  const path = `#/${parts.map(encodeURIComponent).join("/")}`;
  return query.size ? `${path}?${query}` : path;
}

export function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const decode = (part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  };
  return { parts: path.split("/").filter(Boolean).map(decode), params: new URLSearchParams(query) };
}

/** Change the address without leaving what is shown. */
export const replace = (parts, params) => history.replaceState(null, "", link(parts, params));

/** A whole number that an address names, or undefined. */
export function whole(params, name) {
  const text = params.get(name) ?? "";
  return /^\d{1,12}$/.test(text) ? Number(text) : undefined;
}
