#include "records.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "json.hpp"
#include "sha256.hpp"
#include "utf8.hpp"

namespace cpt {

namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr std::size_t kLongestName = 40;  // of a field that is named in a reason

std::size_t offset_in(std::string_view data, const char* at) { return static_cast<std::size_t>(at - data.data()); }

// Bytes of the white characters that `line` begins with.
std::size_t white_prefix(std::string_view line) {
  const char* at = line.data();
  const char* const end = at + line.size();
  while (at < end) {
    const bool ascii = static_cast<unsigned char>(*at) < 0x80;
    if (!ascii && utf8::valid_sequence(at, end) == 0) break;
    const char* next = at;
    if (!utf8::is_space(utf8::decode(next))) break;
    at = next;
  }
  return offset_in(line, at);
}

bool is_white(std::string_view line) { return white_prefix(line) == line.size(); }

// Cuts data into lines, without their ends.
class Lines {
 public:
  explicit Lines(std::string_view data) : rest_(data) {}

  bool next(std::string_view& line) {
    if (rest_.empty()) return false;
    const void* found = std::memchr(rest_.data(), '\n', rest_.size());
    const std::size_t size = found == nullptr ? rest_.size() : offset_in(rest_, static_cast<const char*>(found));
    line = rest_.substr(0, size);
    rest_.remove_prefix(std::min(size + 1, rest_.size()));
    return true;
  }

 private:
  std::string_view rest_;
};

std::string too_long(std::int64_t longest) {
  return "a record of more than " + std::to_string(longest) + " bytes; split it";
}

std::string not_utf8(std::string_view line, std::size_t valid) {
  static const char kHex[] = "0123456789abcdef";
  const auto byte = static_cast<unsigned char>(line[valid]);
  return std::string("not valid UTF-8 (byte 0x") + kHex[byte >> 4] + kHex[byte & 15] + " at byte " +
         std::to_string(valid + 1) + " of the line); convert the file first";
}

std::string not_a_text(std::string_view field, const char* got) {
  return "field '" + std::string(field) + "' holds " + got + ", expected a string";
}

std::string lone_surrogate(std::string_view field) {
  return "'" + std::string(field) + "' holds a lone surrogate; remove it";
}

std::string shortened(std::string name) {
  if (name.size() <= kLongestName) return name;
  std::size_t size = kLongestName;
  while ((static_cast<unsigned char>(name[size]) & 0xC0) == 0x80) --size;
  return name.substr(0, size) + "...";
}

std::string no_field(std::string_view line, std::string_view text_field) {
  std::vector<std::string> have;
  JsonScanner(line).scan([&have](const JsonValue& key, const JsonValue&) {
    std::string name;
    if (append_string(key, name)) have.push_back(shortened(std::move(name)));
  });
  std::sort(have.begin(), have.end());
  std::string reason = "no field '" + std::string(text_field) + "' (fields here: ";
  constexpr std::size_t kMost = 20;
  for (std::size_t k = 0; k < std::min(have.size(), kMost); ++k) reason += (k ? ", " : "") + have[k];
  return reason + (have.empty() ? "none" : have.size() > kMost ? ", ..." : "") + "); name the one with the text";
}

// Adds the document of one line of JSON, or returns why there is none.
std::string add_json(std::string_view line, std::string_view text_field, std::int64_t number, bool keep_record,
                     Block& block) {
  const std::size_t valid = utf8::valid_prefix(line);
  if (valid != line.size()) return not_utf8(line, valid);
  JsonValue text, name;
  const JsonKind kind = JsonScanner(line).scan([&](const JsonValue& key, const JsonValue& value) {
    if (spells(key, text_field)) text = value;
    if (spells(key, "id")) name = value;
  });
  if (kind != JsonKind::object)
    return std::string("got a JSON ") + name_of(kind) + ", expected one object a line";
  if (text.kind == JsonKind::missing) return no_field(line, text_field);
  if (text.kind != JsonKind::string) return not_a_text(text_field, name_of(text.kind));
  switch (name.kind) {
    case JsonKind::missing: case JsonKind::null: name = {}; break;
    case JsonKind::string: case JsonKind::number: break;
    default: return std::string("field 'id' holds ") + name_of(name.kind) + ", expected a string or a number";
  }
  const std::size_t before = block.text.size();
  if (!append_string(text, block.text)) return lone_surrogate(text_field);
  if (!append_string(name, block.names)) {
    block.text.resize(before);
    return lone_surrogate("id");
  }
  block.close(number);
  if (keep_record) block.keep(line, {text.raw.data() - 1, text.raw.size() + 2});
  return {};
}

// Why a paragraph that begins at line `number` is no document; moves `number` to the line of the trouble.
std::string fault_of_text(std::string_view text, std::int64_t& number) {
  const std::size_t valid = utf8::valid_prefix(text);
  const void* nul = std::memchr(text.data(), '\0', valid);
  if (valid == text.size() && nul == nullptr) return {};
  const std::size_t place = nul == nullptr ? valid : offset_in(text, static_cast<const char*>(nul));
  const std::string_view before = text.substr(0, place);
  number += std::count(before.begin(), before.end(), '\n');
  const std::size_t line = before.rfind('\n') + 1;  // npos + 1 is 0
  if (nul == nullptr) return not_utf8(text.substr(line), place - line);
  return "a NUL at byte " + std::to_string(place - line + 1) + " of the line; this is not a text file, or remove it";
}

std::string_view without_line_ends(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.remove_suffix(1);
  return text;
}

// Adds a document of a text file: a line ends at LF or CR LF, which is read as LF.
void add_text(std::string_view text, std::int64_t line, Block& block) {
  while (!text.empty()) {
    const std::size_t found = text.find("\r\n");
    block.text.append(text.substr(0, found));
    text.remove_prefix(found == std::string_view::npos ? text.size() : found + 1);
  }
  block.close(line);
}

std::string_view without_mark(std::string_view data, std::int64_t first_line) {
  const bool marked = first_line == 1 && data.substr(0, kByteOrderMark.size()) == kByteOrderMark;
  return marked ? data.substr(kByteOrderMark.size()) : data;
}

}  // namespace

Block parse_jsonl(std::string_view data, std::string_view text_field, std::int64_t first_line, std::int64_t longest,
                  bool keep_records) {
  Block block;
  block.origin = keep_records ? Block::Origin::kept_json : Block::Origin::json;
  block.text.reserve(data.size());
  Lines lines(without_mark(data, first_line));
  std::string_view line;
  for (std::int64_t number = first_line; lines.next(line); ++number) {
    std::string reason;
    if (static_cast<std::int64_t>(line.size()) > longest) {
      reason = too_long(longest);
    } else if (is_white(line)) {
      continue;
    } else {
      if (line.back() == '\r') line.remove_suffix(1);
      try {
        reason = add_json(line, text_field, number, keep_records, block);
      } catch (const JsonError& caught) {
        reason = std::string("not a line of JSON (") + caught.what() + "); expected one JSON object a line";
      }
    }
    if (!reason.empty()) block.faults.push_back({number, std::move(reason)});
  }
  return block;
}

Block parse_txt(std::string_view data, std::int64_t first_line, std::int64_t longest) {
  Block block;
  block.text.reserve(data.size());
  data = without_mark(data, first_line);
  const char* from = nullptr;  // of the document that is being read
  std::int64_t from_line = 0;
  const auto finish = [&](const char* end) {
    if (from == nullptr) return;
    const std::string_view whole(from, static_cast<std::size_t>(end - from));
    const std::string_view text = without_line_ends(whole);
    std::string reason = static_cast<std::int64_t>(whole.size()) > longest ? too_long(longest)
                                                                          : fault_of_text(text, from_line);
    if (reason.empty()) {
      add_text(text, from_line, block);
    } else {
      block.faults.push_back({from_line, std::move(reason)});
    }
    from = nullptr;
  };
  Lines lines(data);
  std::string_view line;
  for (std::int64_t number = first_line; lines.next(line); ++number) {
    if (is_white(line)) {
      finish(line.data());
    } else if (from == nullptr) {
      from = line.data();
      from_line = number;
    }
  }
  finish(data.data() + data.size());
  return block;
}

Block parse_columns(const Column& texts, const std::optional<Column>& names, std::size_t rows,
                    std::string_view text_field, std::int64_t first_row, std::int64_t longest) {
  const auto cell = [](const Column& column, std::size_t row) -> std::optional<std::string_view> {
    if (column.valid != nullptr && !column.valid[row]) return std::nullopt;
    const auto start = static_cast<std::size_t>(column.offsets[row]);
    return column.data.substr(start, static_cast<std::size_t>(column.offsets[row + 1]) - start);
  };
  Block block;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::int64_t number = first_row + static_cast<std::int64_t>(row);
    const auto text = cell(texts, row);
    const auto name = names ? cell(*names, row) : std::nullopt;
    if (!text) {
      block.faults.push_back({number, not_a_text(text_field, "null")});
    } else if (static_cast<std::int64_t>(text->size()) > longest) {
      block.faults.push_back({number, too_long(longest)});
    } else if (!utf8::valid(*text) || (name && !utf8::valid(*name))) {
      block.faults.push_back({number, "not valid UTF-8; convert the file first"});
    } else {
      block.add(*text, name.value_or(std::string_view()), number);
    }
  }
  return block;
}

std::size_t last_border(std::string_view data, bool paragraphs) {
  std::size_t end = data.rfind('\n') + 1;  // npos + 1 is 0
  while (paragraphs && end != 0) {
    const std::size_t start = end < 2 ? 0 : data.rfind('\n', end - 2) + 1;
    if (is_white(data.substr(start, end - start))) return end;
    end = start;
  }
  return end;
}

std::size_t first_border(std::string_view data, bool paragraphs) {
  std::size_t start = 0;
  for (std::size_t end; (end = data.find('\n', start) + 1) != 0; start = end)
    if (!paragraphs || is_white(data.substr(start, end - start))) return end;
  return 0;
}

std::string_view unfinished(std::string_view data, bool paragraphs) {
  if (!paragraphs) return {};
  const std::string_view line = data.substr(data.rfind('\n') + 1);
  const std::string_view rest = line.substr(white_prefix(line));
  return rest.size() < 4 ? rest : std::string_view("x");  // a white line so far, perhaps cut in a character; or not one
}

std::string write_jsonl(const Block& block, const unsigned char* keep,
                        const std::vector<std::optional<std::string_view>>& changed) {
  if (block.origin == Block::Origin::json)
    throw std::invalid_argument("the block was parsed without keep_records: its lines are gone");
  std::string out;
  out.reserve(block.text.size() + block.records.size());
  for (std::size_t k = 0; k < block.size(); ++k) {
    if (!keep[k]) continue;
    const std::string_view text = changed.empty() ? block.document(k) : changed[k].value_or(block.document(k));
    if (block.origin == Block::Origin::plain) {
      out += '{';
      if (!block.name(k).empty()) {
        out += "\"id\": ";
        append_quoted(block.name(k), out);
        out += ", ";
      }
      out += "\"text\": ";
      append_quoted(text, out);
      out += '}';
    } else if (changed.empty() || !changed[k] || text == block.document(k)) {
      out += block.record(k);
    } else {
      const std::string_view record = block.record(k);
      const auto start = static_cast<std::size_t>(block.string_starts[k] - (record.data() - block.records.data()));
      const auto end = static_cast<std::size_t>(block.string_ends[k] - (record.data() - block.records.data()));
      out += record.substr(0, start);
      append_quoted(text, out);
      out += record.substr(end);
    }
    out += '\n';
  }
  return out;
}

void held_out(const Block& block, double fraction, unsigned char* out) {
  const double bound = std::ldexp(fraction, 64);
  for (std::size_t k = 0; k < block.size(); ++k) {
    if (!(bound > 0.0) || bound >= 0x1p64) {
      out[k] = bound > 0.0;
      continue;
    }
    const std::string_view work = block.name(k).substr(0, block.name(k).find('#'));
    Sha256 hash;
    hash.update(work.empty() ? block.document(k) : work);
    const Sha256::Digest digest = hash.digest();
    std::uint64_t first = 0;
    for (int byte = 0; byte < 8; ++byte) first = first << 8 | digest[static_cast<std::size_t>(byte)];
    out[k] = first < static_cast<std::uint64_t>(std::ceil(bound));
  }
}

}  // namespace cpt
