#include "json.hpp"

#include <array>
#include <cstdint>
#include <cstring>

#include "utf8.hpp"

namespace cpt {

namespace {

constexpr std::uint64_t kOnes = 0x0101010101010101u;

// Eight bytes, the first one lowest.
std::uint64_t load8(const char* at) {
  const std::uint64_t bytes = utf8::load8(at);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return __builtin_bswap64(bytes);
#else
  return bytes;
#endif
}

// The lowest set bit is the high bit of the lowest byte where `bytes` holds a quote, a backslash or a control character.
std::uint64_t special(std::uint64_t bytes) {
  const std::uint64_t quote = bytes ^ kOnes * '"';
  const std::uint64_t backslash = bytes ^ kOnes * '\\';
  return (((quote - kOnes) & ~quote) | ((backslash - kOnes) & ~backslash) | ((bytes - kOnes * 0x20) & ~bytes)) &
         utf8::kHighBits;
}

bool is_special(char byte) { return byte == '"' || byte == '\\' || static_cast<unsigned char>(byte) < 0x20; }

// The first byte of a string that does not stand for itself.
const char* plain_end(const char* at, const char* end) {
  while (end - at >= 8) {
    const std::uint64_t found = special(load8(at));
    if (found != 0) return at + __builtin_ctzll(found) / 8;
    at += 8;
  }
  while (at < end && !is_special(*at)) ++at;
  return at;
}

// The value of each hexadecimal digit, -1 for all other bytes.
constexpr std::array<std::int8_t, 256> hex_digits() {
  std::array<std::int8_t, 256> digits{};
  for (int byte = 0; byte < 256; ++byte) {
    const int value = byte >= '0' && byte <= '9'   ? byte - '0'
                      : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
                      : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                                   : -1;
    digits[static_cast<std::size_t>(byte)] = static_cast<std::int8_t>(value);
  }
  return digits;
}

constexpr std::array<std::int8_t, 256> kDigits = hex_digits();

// The number that four hexadecimal digits spell; below 0 where they are none.
int code_unit(const char* digits) {
  const auto digit = [digits](int k) -> int { return kDigits[static_cast<unsigned char>(digits[k])]; };
  const int a = digit(0), b = digit(1), c = digit(2), d = digit(3);
  return (a | b | c | d) < 0 ? -1 : a << 12 | b << 8 | c << 4 | d;
}

char unescaped(char letter) {
  switch (letter) {
    case 'b': return '\b';
    case 'f': return '\f';
    case 'n': return '\n';
    case 'r': return '\r';
    case 't': return '\t';
    default: return letter;  // a quote, a slash or a backslash
  }
}

// Decodes the "\uXXXX" (or pair of them) at `at` and moves behind it; false for half of a pair.
bool decode_escape(const char*& at, const char* end, char32_t& code) {
  code = static_cast<char32_t>(code_unit(at + 2));
  at += 6;
  if ((code & 0xF800) != 0xD800) return true;
  if (code >= 0xDC00 || end - at < 6 || at[0] != '\\' || at[1] != 'u') return false;
  const auto low = static_cast<char32_t>(code_unit(at + 2));
  if ((low & 0xFC00) != 0xDC00) return false;
  code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF);
  at += 6;
  return true;
}

}  // namespace

const char* name_of(JsonKind kind) {
  switch (kind) {
    case JsonKind::object: return "object";
    case JsonKind::array: return "array";
    case JsonKind::string: return "string";
    case JsonKind::number: return "number";
    case JsonKind::boolean: return "boolean";
    case JsonKind::null: return "null";
    case JsonKind::missing: break;
  }
  return "nothing";
}

bool append_string(const JsonValue& value, std::string& out) {
  if (!value.escaped) {
    out.append(value.raw);
    return true;
  }
  const std::size_t before = out.size();
  out.resize(before + value.raw.size());  // an escape is never shorter than what it stands for
  char* to = out.data() + before;
  const char* at = value.raw.data();
  const char* const end = at + value.raw.size();
  while (at < end) {
    if (*at != '\\') {
      const void* found = std::memchr(at, '\\', static_cast<std::size_t>(end - at));
      const char* const stop = found == nullptr ? end : static_cast<const char*>(found);
      std::memcpy(to, at, static_cast<std::size_t>(stop - at));
      to += stop - at;
      at = stop;
    } else if (at[1] != 'u') {
      *to++ = unescaped(at[1]);
      at += 2;
    } else {
      char32_t code = 0;
      if (!decode_escape(at, end, code)) {
        out.resize(before);
        return false;
      }
      to += utf8::encode(code, to);
    }
  }
  out.resize(static_cast<std::size_t>(to - out.data()));
  return true;
}

bool spells(const JsonValue& key, std::string_view name) {
  if (!key.escaped) return key.raw == name;
  std::string text;
  return append_string(key, text) && text == name;
}

void append_quoted(std::string_view text, std::string& out) {
  static const char kHex[] = "0123456789abcdef";
  out.push_back('"');
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at < end) {
    const char* const stop = plain_end(at, end);
    out.append(at, stop);
    if (stop == end) break;
    out.push_back('\\');
    switch (*stop) {
      case '"': case '\\': out.push_back(*stop); break;
      case '\b': out.push_back('b'); break;
      case '\f': out.push_back('f'); break;
      case '\n': out.push_back('n'); break;
      case '\r': out.push_back('r'); break;
      case '\t': out.push_back('t'); break;
      default: out.append({'u', '0', '0', kHex[*stop >> 4], kHex[*stop & 15]});
    }
    at = stop + 1;
  }
  out.push_back('"');
}

JsonValue JsonScanner::key() {
  if (peek() != '"') fail("a field name in double quotes");
  const JsonValue name = string();
  skip_space();
  if (peek() != ':') fail("':'");
  ++at_;
  skip_space();
  return name;
}

JsonValue JsonScanner::value() {
  if (peek() == '"') return string();
  const char* const from = at_;
  const JsonKind kind = peek() == '{' || peek() == '[' ? container() : scalar();
  return {kind, false, {from, static_cast<std::size_t>(at_ - from)}};
}

JsonValue JsonScanner::string() {
  const char* const from = ++at_;
  bool escaped = false;
  for (;;) {
    at_ = plain_end(at_, end_);
    if (at_ == end_) fail("the end of a string");
    if (*at_ == '"') break;
    if (*at_ != '\\') fail("control characters to be escaped");
    escaped = true;
    do escape();
    while (peek() == '\\');
  }
  const JsonValue found{JsonKind::string, escaped, {from, static_cast<std::size_t>(at_ - from)}};
  ++at_;
  return found;
}

void JsonScanner::escape() {
  ++at_;
  const char letter = peek();
  if (letter != 'u') {
    if (letter == '\0' || std::strchr("\"\\/bfnrt", letter) == nullptr) fail("one of \"\\/bfnrtu behind a backslash");
    ++at_;
  } else {
    ++at_;
    if (end_ - at_ < 4 || code_unit(at_) < 0) fail("four hexadecimal digits behind \\u");
    at_ += 4;
  }
}

// Reads an object or a list to its end, holding the open brackets instead of calling itself.
JsonKind JsonScanner::container() {
  const JsonKind kind = *at_ == '{' ? JsonKind::object : JsonKind::array;
  std::string open;
  const auto closing = [&open] { return open.back() == '{' ? '}' : ']'; };
  do {
    if (peek() == '{' || peek() == '[') {
      open.push_back(*at_++);
      skip_space();
      if (peek() != closing()) {
        if (open.back() == '{') key();
        continue;
      }
    } else if (peek() == '"') {
      string();
      skip_space();
    } else {
      scalar();
      skip_space();
    }
    while (!open.empty() && peek() == closing()) {
      ++at_;
      open.pop_back();
      if (!open.empty()) skip_space();
    }
    if (open.empty()) break;
    if (peek() != ',') fail(std::string("',' or '") + closing() + "'");
    ++at_;
    skip_space();
    if (open.back() == '{') key();
  } while (true);
  return kind;
}

JsonKind JsonScanner::scalar() {
  switch (peek()) {
    case 't': word("true"); return JsonKind::boolean;
    case 'f': word("false"); return JsonKind::boolean;
    case 'n': word("null"); return JsonKind::null;
    default: number(); return JsonKind::number;
  }
}

void JsonScanner::word(std::string_view expected) {
  if (std::string_view(at_, static_cast<std::size_t>(end_ - at_)).substr(0, expected.size()) != expected)
    fail("a JSON value");
  at_ += expected.size();
}

void JsonScanner::digits() {
  if (peek() < '0' || peek() > '9') fail("a JSON value");
  while (peek() >= '0' && peek() <= '9') ++at_;
}

void JsonScanner::number() {
  if (peek() == '-') ++at_;
  if (peek() == '0') {
    ++at_;
  } else {
    digits();
  }
  if (peek() == '.') {
    ++at_;
    digits();
  }
  if (peek() == 'e' || peek() == 'E') {
    ++at_;
    if (peek() == '+' || peek() == '-') ++at_;
    digits();
  }
}

void JsonScanner::fail(const std::string& expected) const {
  const std::string place = at_ == end_ ? "where the line ends" : "at byte " + std::to_string(at_ - begin_ + 1);
  throw JsonError("expected " + expected + " " + place);
}

}  // namespace cpt
