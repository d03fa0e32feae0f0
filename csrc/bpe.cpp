#include "bpe.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "utf8.hpp"

namespace cpt {

namespace {

constexpr std::size_t kPadding = 16;     // readable bytes behind a text
constexpr std::size_t kKeptBytes = std::size_t{1} << 23;  // of text, from block to block
constexpr std::size_t kKeptSymbols = std::size_t{1} << 20;  // of a part, from part to part
constexpr std::size_t kWordsAhead = 16;  // words whose places in the cache are asked for before the first is used

bool is_letter(char byte) { return static_cast<unsigned char>((byte | 0x20) - 'a') < 26; }

// Letters from `at` on: reads whole words of 8 bytes.
std::size_t letters(const char* at) {
  std::size_t count = 0;
  for (;; count += 8) {
    const std::uint64_t bytes = utf8::load8(at + count);
    const std::uint64_t lower = (bytes | 0x2020202020202020u) & ~utf8::kHighBits;
    const std::uint64_t from_a = lower + 0x1f1f1f1f1f1f1f1fu;   // high bit: at least 'a'
    const std::uint64_t after_z = lower + 0x0505050505050505u;  // high bit: above 'z'
    const std::uint64_t others = ~(from_a & ~after_z & ~bytes) & utf8::kHighBits;
    if (others) return count + static_cast<std::size_t>(__builtin_ctzll(others)) / 8;
  }
}

// Encodes texts behind what is in `out`. Until `finish`, `out.tokens` is longer than what was written.
template <class Token>
class Run {
 public:
  Run(const BpeTables& tables, BpeScratch& scratch, Encoded<Token>& out)
      : tables_(tables), scratch_(scratch), out_(out) {}

  // 16 bytes behind `end` must be readable.
  void encode(const char* at, const char* end) {
    while (at < end) {
      const char* const start = at;
      if (static_cast<unsigned char>(*at) < 0x80 && ascii_part(at, end)) {
        queue(start, static_cast<std::size_t>(at - start));
        continue;
      }
      flush();
      const char* const seen = at;  // `start`, or where a part of ASCII turned out to go on with more
      at = part(start, end);
      while (at < seen) at = part(at, end);  // all of it, so that no byte is looked through twice
    }
    flush();
  }

  std::size_t size() const { return size_; }

  void put(std::uint32_t token) {
    reserve(1);
    out_.tokens[size_++] = static_cast<Token>(token);
  }

  void truncate(std::size_t size) { size_ = size; }

  // Without byte fallback a run of unknown characters is one token. Counts what stays.
  void join_unknown(std::size_t first) {
    const auto unknown = static_cast<Token>(tables_.unknown());
    Token* const begin = out_.tokens.data() + first;
    const auto both = [unknown](Token a, Token b) { return a == unknown && b == unknown; };
    Token* const end = std::unique(begin, out_.tokens.data() + size_, both);
    out_.unknown_tokens += std::count(begin, end, unknown);
    size_ = static_cast<std::size_t>(end - out_.tokens.data());
  }

  void finish() { out_.tokens.resize(size_); }

 private:
  struct Queued {
    const char* at;
    std::size_t bytes;
    WordKey key;
    Word* bucket;
  };

  void reserve(std::size_t more) {
    if (size_ + more > out_.tokens.size()) out_.tokens.resize((size_ + more) * 3 / 2 + 1024);
  }

  // Moves `at` from the begin of a part to its end; where it holds more than ASCII, to the first such character
  // and returns false. Letters are never cut from letters nor from a space before them: a cut is a right, not
  // a duty.
  bool ascii_part(const char*& at, const char* end) const {
    ++at;
    while (true) {
      if (at[-1] == ' ' || is_letter(at[-1])) at += letters(at);
      if (at >= end) {
        at = end;
        return true;
      }
      const auto next = static_cast<unsigned char>(*at);
      if (next >= 0x80) return !joins_behind(static_cast<unsigned char>(at[-1]), at);
      if (!tables_.ascii_joins(static_cast<unsigned char>(at[-1]), next)) return true;
      ++at;
    }
  }

  bool joins_behind(unsigned char left, const char* at) const {
    const Symbol a = tables_.character(left);
    const Symbol b = tables_.character(utf8::decode(at));
    return a != kNoSymbol && b != kNoSymbol && tables_.joins(a, b);
  }

  void queue(const char* at, std::size_t bytes) {
    if (bytes > WordKey::kMaxBytes || !scratch_.cache.is_worth_asking()) {
      flush();
      if (bytes <= WordKey::kMaxBytes) scratch_.cache.count(bytes, 0);
      parts(at, at + bytes);
      return;
    }
    Queued& word = queue_[queued_++];
    word.at = at;
    word.bytes = bytes;
    word.key = WordKey::of(at, bytes);
    word.bucket = scratch_.cache.bucket(word.key);
    if (queued_ == kWordsAhead) flush();
  }

  void flush() {
    if (queued_ == 0) return;
    std::size_t bytes = 0;
    std::size_t known_bytes = 0;
    reserve(kWordsAhead * Word::kMaxTokens);
    for (std::size_t k = 0; k < queued_; ++k) {
      const Queued& word = queue_[k];
      bytes += word.bytes;
      if (const Word* known = WordCache::find(word.bucket, word.key)) {
        Token* const to = out_.tokens.data() + size_;
        for (std::size_t t = 0; t < Word::kMaxTokens; ++t) to[t] = static_cast<Token>(known->tokens[t]);
        size_ += known->count;
        out_.byte_tokens += known->byte_tokens;
        known_bytes += word.bytes;
      } else {
        learn(word);
        reserve(kWordsAhead * Word::kMaxTokens);
      }
    }
    queued_ = 0;
    scratch_.cache.count(bytes, known_bytes);
  }

  void learn(const Queued& word) {
    const std::size_t before = size_;
    const std::int64_t bytes_before = out_.byte_tokens;
    parts(word.at, word.at + word.bytes);
    const std::size_t count = size_ - before;
    if (count > Word::kMaxTokens) return;
    const std::int64_t byte_tokens = out_.byte_tokens - bytes_before;
    Word fresh{word.key, {}, static_cast<std::uint16_t>(count), static_cast<std::uint16_t>(byte_tokens)};
    for (std::size_t k = 0; k < count; ++k) fresh.tokens[k] = static_cast<std::uint32_t>(out_.tokens[before + k]);
    WordCache::put(word.bucket, fresh);
  }

  void parts(const char* at, const char* end) {
    while (at < end) at = part(at, end);
  }

  // Merges and writes the part that begins at `at`; returns its end.
  const char* part(const char* at, const char* end) {
    const char* const start = at;
    Symbol symbol = tables_.character(utf8::decode(at));
    if (symbol == kNoSymbol) {
      spell(start, at);
      return at;
    }
    Symbol symbols[kShortPart];
    Symbol pairs[kShortPart];  // what each symbol and the next become
    std::size_t count = 1;
    symbols[0] = symbol;
    while (at < end) {
      const char* next = at;
      const Symbol right = tables_.character(utf8::decode(next));
      if (right == kNoSymbol || !tables_.joins(symbol, right)) break;
      if (count == kShortPart) return long_part(start, end);
      pairs[count - 1] = tables_.merged(symbol, right);
      symbols[count++] = symbol = right;
      at = next;
    }
    count = merge_short(tables_, symbols, pairs, count);
    for (std::size_t k = 0; k < count; ++k) write(symbols[k]);
    return at;
  }

  const char* long_part(const char* at, const char* end) {
    std::vector<Symbol>& symbols = scratch_.symbols;
    symbols.assign(1, tables_.character(utf8::decode(at)));
    while (at < end) {
      const char* next = at;
      const Symbol right = tables_.character(utf8::decode(next));
      if (right == kNoSymbol || !tables_.joins(symbols.back(), right)) break;
      if (symbols.size() == kKeptSymbols) symbols.reserve(kKeptSymbols + static_cast<std::size_t>(end - at));
      symbols.push_back(right);
      at = next;
    }
    scratch_.merger.merge(tables_, symbols);
    for (const Symbol symbol : symbols) write(symbol);
    if (symbols.capacity() > kKeptSymbols) symbols = std::vector<Symbol>();
    return at;
  }

  void write(Symbol symbol) {
    const std::uint32_t token = tables_.token(symbol);
    if (token != kNoSymbol) {
      put(token);
      return;
    }
    for (const std::uint32_t id : tables_.tokens(symbol)) put(id);
    out_.byte_tokens += tables_.bytes_among(symbol);
  }

  // A character that no piece holds.
  void spell(const char* at, const char* end) {
    if (!tables_.byte_fallback()) {
      put(tables_.unknown());
      return;
    }
    out_.byte_tokens += end - at;
    reserve(4);
    for (; at < end; ++at) out_.tokens[size_++] = static_cast<Token>(tables_.byte_token(static_cast<unsigned char>(*at)));
  }

  const BpeTables& tables_;
  BpeScratch& scratch_;
  Encoded<Token>& out_;
  std::size_t size_ = 0;
  std::array<Queued, kWordsAhead> queue_;
  std::size_t queued_ = 0;
};

// The text between user-defined symbols is merged on its own; they are taken first, the longest wherever one begins.
template <class Token>
void encode_around(const PrefixSet& symbols, std::string_view text, Run<Token>& run) {
  std::size_t start = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    const auto match = symbols.begins(text[at]) ? symbols.match(text.substr(at)) : PrefixSet::Match{};
    if (match.length == 0) {
      at += utf8::length(text[at]);
      continue;
    }
    run.encode(text.data() + start, text.data() + at);
    run.put(match.value);
    start = at += match.length;
  }
  run.encode(text.data() + start, text.data() + text.size());
}

}  // namespace

BpeEncoder::BpeEncoder(const std::vector<Piece>& pieces, bool byte_fallback, const NormalizerSettings& settings)
    : tables_(pieces, byte_fallback, settings.escape_whitespaces), normalizer_(settings, [&] {
        std::vector<std::string> texts;
        for (const Piece& piece : pieces) {
          if (piece.type == PieceType::kUserDefined) texts.push_back(piece.text);
        }
        return texts;
      }()) {}

template <class Token>
Encoded<Token> BpeEncoder::encode(const Block& block, Borders borders) const {
  if (tables_.vocab_size() > std::size_t{std::numeric_limits<Token>::max()} + 1) {
    throw std::invalid_argument("the ids of this vocabulary do not fit the type of the tokens");
  }
  Encoded<Token> out;
  out.lengths.reserve(block.size());
  out.tokens.resize(block.text.size() / 3);
  std::unique_ptr<BpeScratch> scratch = take_scratch();
  Run<Token> run(tables_, *scratch, out);
  for (std::size_t k = 0; k < block.size(); ++k) {
    const std::size_t before = run.size();
    if (borders.before >= 0) run.put(static_cast<std::uint32_t>(borders.before));
    const std::size_t first = run.size();
    normalizer_(block.document(k), scratch->text);
    const std::size_t bytes = scratch->text.size();
    scratch->text.append(kPadding, '\0');
    const std::string_view text(scratch->text.data(), bytes);
    if (tables_.user_defined().empty()) {
      run.encode(text.data(), text.data() + bytes);
    } else {
      encode_around(tables_.user_defined(), text, run);
    }
    if (!tables_.byte_fallback()) run.join_unknown(first);
    if (run.size() == first) {
      run.truncate(before);
    } else if (borders.after >= 0) {
      run.put(static_cast<std::uint32_t>(borders.after));
    }
    const std::size_t length = run.size() - before;
    if (length > std::size_t{std::numeric_limits<std::int32_t>::max()}) {
      throw std::length_error("a document of more than 2^31 tokens");
    }
    out.lengths.push_back(static_cast<std::int32_t>(length));
  }
  run.finish();
  give_back(std::move(scratch));
  return out;
}

std::unique_ptr<BpeScratch> BpeEncoder::take_scratch() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return std::make_unique<BpeScratch>();
  std::unique_ptr<BpeScratch> scratch = std::move(idle_.back());
  idle_.pop_back();
  return scratch;
}

void BpeEncoder::give_back(std::unique_ptr<BpeScratch> scratch) const {
  if (scratch->text.capacity() > kKeptBytes) scratch->text = std::string();
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(scratch));
}

template Encoded<std::uint16_t> BpeEncoder::encode(const Block&, Borders) const;
template Encoded<std::int32_t> BpeEncoder::encode(const Block&, Borders) const;

}  // namespace cpt
